"""Labels to classes, for sources that note a number or a string with every image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from workers.sources.source import Checked, Source, Stored

Label = int | str
Labelled = Mapping[Label, Sequence[str]]  # label to the names of its images


def from_labels(
    told: Checked,
    train: Labelled,
    test: Labelled | None,
    read: Callable[[str], Stored],
    names: Sequence[str] | None = None,
) -> Source:
    """A source whose classes are the labels of the training images: by number, called by `names`, or sorted strings.

    Names that serve several numbers have the number added. Raises UserError (dataset): "bad_label" for a number that
    the names do not reach and for numbers mixed with strings, and those of `Checked.source`.
    """
    classes = _class_names(told, train, names)
    known = {name: tuple(train[label]) for label, name in classes.items()}
    if test is None:
        return told.source(known, None, read)
    # A label that training lacks goes by its number, and is refused by it.
    return told.source(known, {classes.get(label, str(label)): tuple(images) for label, images in test.items()}, read)


def by_label(told: Checked, labels: Iterable[Label | None], what: str, prefix: str) -> dict[Label, list[str]]:
    """Label to the names of its rows, which are `prefix` and the number of the row.

    Raises UserError "missing_label" (dataset), also for the -1 by which the hub marks images without one.
    """
    found: dict[Label, list[str]] = defaultdict(list)
    for row, label in enumerate(labels):
        if label is None or label == -1:
            raise told.refusal(f"Row {row} of {what} has no label.", "missing_label")
        found[label].append(f"{prefix}{row:09d}")
    return found


def _class_names(told: Checked, train: Labelled, names: Sequence[str] | None) -> dict[Label, str]:
    numbers = sorted(label for label in train if isinstance(label, int))
    words = sorted(label for label in train if isinstance(label, str))
    if numbers and words:
        message = f"{told.origin} has numbers and strings for labels: {numbers[0]} and '{words[0][:100]}'."
        raise told.refusal(message, "bad_label")
    if names is None or words:
        found: list[Label] = [*numbers, *words]
        return {label: str(label) for label in found}
    outside = [label for label in numbers if not 0 <= label < len(names)]
    if outside:
        message = f"{told.origin} has the label {outside[0]}, and names for {len(names)} classes from 0 on."
        raise told.refusal(message, "bad_label")
    count = Counter(names)
    return {label: names[label] if count[names[label]] == 1 else f"{names[label]} ({label})" for label in numbers}
