"""A result's model as ONNX: `python -m workers.onnx_export --directory RESULT` writes RESULT/model.onnx.

One input, `images` [B, C, H, W] in float32, and one output, `logits` [B, K]; the batch size B is free.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from workers.artifact import FILE_MODE
from workers.export import ONNX_FILE
from workers.prediction import load_model

OPSET = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="the result folder")
    write_onnx(parser.parse_args().directory)


def write_onnx(directory: Path) -> None:
    """Write `model.onnx` beside the weights. Raises UserError "bad_result", and whatever torch does."""
    model, config = load_model(directory)
    example_BCHW = torch.zeros(2, *config["pretrained_cfg"]["input_size"])
    torch.onnx.export(
        model,
        (example_BCHW,),
        directory / ONNX_FILE,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    (directory / ONNX_FILE).chmod(FILE_MODE)


if __name__ == "__main__":
    main()
