"""What a head is worth, before training: six measures, by one pass over some images on the whole model.

A gate c = 1 multiplies the head's attention output and its slice of the MLP. For image i, the slope ∂loss_i/∂c is the
inner product of those outputs with their gradients. Its square, summed over images, is the empirical Fisher information
of the gate; its size is what the loss would change by without the head, to first order. Only activations need gradients
for that, so that a pass costs two thirds of a training pass and no memory for weight gradients. A pass for `activation`
costs a third, one for `weight` reads no image.

What the kinds mean is said in `scheduler.scores`. Each worker scores other images on the whole model; the scheduler
adds the sums up.

Shapes: L blocks, H heads, B images, N tokens, D width, K head width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scheduler.scores import BY_SAMPLE, KINDS
from workers.anatomy import Half, Model, halves
from workers.lora import DOWN
from workers.partition import Cut, cut_of, head_slices

Batches = Iterable[tuple[Tensor, Tensor]]
Scored = tuple[Tensor, Tensor, int]


def score(
    model: Model,
    batches: Batches,
    kind: str,
    *,
    label_smoothing: float = 0.0,
    keep: Callable[[Tensor], object] | None = None,
) -> Scored:
    """(backward [L, H], forward [L, H], samples): sums in float64 of what `merge` turns into means over workers.

    A sample is an image; for `gradient` a micro-batch; for `weight` and `random`, which look at no image, the model.
    `keep` is given every batch's slopes ∂loss_i/∂gate [B, L, H], for the kinds that are made of them. The model is left
    as it was. Raises ValueError for a kind that is not one of the scheduler's.
    """
    if kind not in KINDS:
        raise ValueError(f"'{kind}' is not a score")
    weight_LH = weight_sizes(model)
    if kind == "random":
        return torch.ones_like(weight_LH), torch.ones_like(weight_LH), 1
    if kind == "weight":
        return weight_LH, weight_LH, 1
    if kind == "activation":
        added_LH, samples = _activation_sums(model, batches)
        return added_LH, added_LH, samples
    if kind == "gradient":
        norms_LH, samples = _gradient_sums(model, batches, label_smoothing)
        return norms_LH, samples * weight_LH, samples
    assert kind in BY_SAMPLE
    total_LH, samples = torch.zeros_like(weight_LH), 0
    for slopes_BLH in gate_slopes(model, batches, label_smoothing):
        total_LH += (slopes_BLH.square() if kind == "fisher" else slopes_BLH.abs()).sum(0)
        samples += len(slopes_BLH)
        if keep is not None:
            keep(slopes_BLH)
    return total_LH, samples * weight_LH if kind == "fisher" else total_LH, samples


def gate_slopes(model: Model, batches: Batches, label_smoothing: float = 0.0) -> Iterator[Tensor]:
    """∂loss_i/∂gate of every image: [B, L, H] in float64 on the CPU, batch by batch; weights are frozen meanwhile."""
    cut = cut_of(model)
    example = next(model.parameters())
    with _trained(model, ()):
        for images_BCHW, labels_B in batches:
            sizes = (cut.shape.num_blocks, len(labels_B), cut.shape.num_heads)
            gates_LBH = torch.ones(sizes, dtype=example.dtype, device=example.device, requires_grad=True)
            with ExitStack() as stack:
                for block, gates_BH in zip(model.blocks, gates_LBH, strict=True):
                    for half in halves(block):
                        stack.callback(_gate(block, half, gates_BH, cut).remove)
                loss = _loss(model, images_BCHW, labels_B, label_smoothing, "sum")
            (slopes_LBH,) = torch.autograd.grad(loss, gates_LBH)
            yield slopes_LBH.double().cpu().transpose(0, 1)


@torch.no_grad()
def weight_sizes(model: Model) -> Tensor:
    """Root of the mean square of each head's weights, [L, H] in float64."""
    cut = cut_of(model)
    counts_H = torch.tensor(cut.shape.head_params, dtype=torch.float64)
    return _norms(model.state_dict(), cut) / counts_H.sqrt()


def _gradient_sums(model: Model, batches: Batches, label_smoothing: float) -> tuple[Tensor, int]:
    """(Σ over micro-batches of the norm of ∂(mean loss)/∂(head's weights), number of micro-batches).

    Of adapters W + s·B·A, which are still B = 0 and so change no output, ∂loss/∂B = s·∂loss/∂W·Aᵀ stands for the head:
    its own rows of B, or its part of the B that its block shares. ∂loss/∂A is 0.
    """
    cut = cut_of(model)
    adapted = sorted({name.partition("_")[0] for name in cut.slices if name.endswith(("_up", "_down"))})
    of_weights = [f"{name}_w" for name in adapted] or list(cut.slices)
    keys = {piece.key for name in of_weights for piece in cut.slices[name]}
    wanted = [f"blocks.{block}.{key}" for block in range(cut.shape.num_blocks) for key in sorted(keys)]
    params = dict(model.named_parameters())
    total_LH, count = torch.zeros(cut.shape.num_blocks, cut.shape.num_heads, dtype=torch.float64), 0
    with _trained(model, wanted):
        for images_BCHW, labels_B in batches:
            loss = _loss(model, images_BCHW, labels_B, label_smoothing, "mean")
            grads = torch.autograd.grad(loss, [params[name] for name in wanted])
            found = dict(zip(wanted, grads, strict=True))
            total_LH += _adapter_norms(found, params, cut, adapted) if adapted else _norms(found, cut)
            count += 1
    return total_LH, count


@torch.no_grad()
def _activation_sums(model: Model, batches: Batches) -> tuple[Tensor, int]:
    """(Σ over images of ‖γ1·attn_h‖ + ‖γ2·mlp_h‖, mean over tokens; number of images)."""
    cut, device = cut_of(model), next(model.parameters()).device
    total_LH, count = torch.zeros(cut.shape.num_blocks, cut.shape.num_heads, dtype=torch.float64), 0
    with ExitStack() as stack:
        for index, block in enumerate(model.blocks):
            for half in halves(block):
                stack.callback(_measure_output(block, half, cut, total_LH[index]).remove)
        for images_BCHW, labels_B in batches:
            model(images_BCHW.to(device))
            count += len(labels_B)
    return total_LH, count


def _measure_output(block: nn.Module, half: Half, cut: Cut, total_H: Tensor) -> RemovableHandle:
    scale = block.get_parameter(half.scale) if half.scale else 1.0

    def whole(_: nn.Module, args: tuple[Tensor], out_BND: Tensor) -> None:
        total_H[0] += _mean_norm(scale * out_BND)

    if cut.whole:
        return block.get_submodule(half.after or half.part).register_forward_hook(whole)
    linear = _output_of(block, half)

    def measure(_: nn.Module, args: tuple[Tensor]) -> None:
        widths = _widths(half, cut)
        of_heads = zip(args[0].split(widths, -1), linear.weight.split(widths, 1), strict=True)
        for head, (x_BNk, w_Dk) in enumerate(of_heads):
            total_H[head] += _mean_norm(scale * (x_BNk @ w_Dk.T))

    return linear.register_forward_pre_hook(measure)


def _mean_norm(out_BND: Tensor) -> Tensor:
    """‖out‖, mean over tokens, sum over images."""
    return out_BND.norm(dim=-1).double().mean(1).sum().cpu()


def _gate(block: nn.Module, half: Half, gates_BH: Tensor, cut: Cut) -> RemovableHandle:
    if cut.whole:
        added = block.get_submodule(half.after or half.part)
        return added.register_forward_hook(lambda _module, _args, out_BND: out_BND * gates_BH[:, :1, None])
    widths = torch.tensor(_widths(half, cut), device=gates_BH.device)

    def gate(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0] * gates_BH.repeat_interleave(widths, dim=1)[:, None]

    return _output_of(block, half).register_forward_pre_hook(gate)


def _output_of(block: nn.Module, half: Half) -> nn.Linear:
    """What sums the heads up."""
    linear = block.get_submodule("attn.proj" if half.part == "attn" else "mlp.fc2")
    assert isinstance(linear, nn.Linear)
    return linear


def _widths(half: Half, cut: Cut) -> list[int]:
    shape = cut.shape
    return [shape.head_dim] * shape.num_heads if half.part == "attn" else list(shape.mlp_dims)


def _loss(model: Model, images_BCHW: Tensor, labels_B: Tensor, smoothing: float, over: str) -> Tensor:
    device = next(model.parameters()).device
    return F.cross_entropy(
        model(images_BCHW.to(device)), labels_B.to(device), label_smoothing=smoothing, reduction=over
    )


@contextmanager
def _trained(model: Model, names: Iterable[str]) -> Iterator[None]:
    """Only the named parameters require gradients here."""
    before = {param: param.requires_grad for param in model.parameters()}
    wanted = set(names)
    try:
        for name, param in model.named_parameters():
            param.requires_grad_(name in wanted)
        yield
    finally:
        for param, requires_grad in before.items():
            param.requires_grad_(requires_grad)


def _norms(tensors: dict[str, Tensor], cut: Cut) -> Tensor:
    """Norm of all slices of each head, [L, H] in float64; `tensors` under timm's names."""
    squares = [
        [_square(head_slices(tensors, block, head, cut)) for head in range(cut.shape.num_heads)]
        for block in range(cut.shape.num_blocks)
    ]
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def _adapter_norms(
    grads: Mapping[str, Tensor], params: Mapping[str, nn.Parameter], cut: Cut, adapted: Sequence[str]
) -> Tensor:
    """Norm of what each head adds to the gradients of its block's B, but for s, [L, H]; `grads` of the matrices."""

    downs = {name: param for name, param in params.items() if name.endswith(f".{DOWN}")}

    def square(block: int, head: int) -> float:
        slices, of_up = head_slices(grads, block, head, cut), {}
        own = head_slices(downs, block, head, cut)
        for name in adapted:
            layer = cut.slices[f"{name}_w"][0].key.removesuffix(".weight")
            down, module = own.get(f"{name}_down"), f"blocks.{block}.{layer}"
            grad = slices[f"{name}_w"]
            of_up[name] = grad @ params[f"{module}.{DOWN}"].T if down is None else grad.T @ down
        return _square(of_up)

    squares = [[square(block, head) for head in range(cut.shape.num_heads)] for block in range(cut.shape.num_blocks)]
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def _square(slices: dict[str, Tensor]) -> float:
    return sum(float(values.double().square().sum()) for values in slices.values())
