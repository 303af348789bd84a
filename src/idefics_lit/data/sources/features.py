"""A split that `datasets` reads: its columns, without decoding files and with typed columns as texts."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.sources.columns import ColumnMapping
from idefics_lit.errors import InputError

LISTS = (datasets.List, datasets.LargeList)


class DatasetSplit:
    """A split that `datasets` reads, and how its rows are read.

    Args:
        dataset: the split.
        name: names the split in error messages.
        columns: see `idefics_lit.data.sources.columns.ColumnMapping`.
        language: see there.
        folder: see there.

    Raises:
        InputError: when a column doesn't exist.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        name: str,
        columns: Mapping[str, str] | None = None,
        language: str = "en",
        folder: str | None = None,
    ) -> None:
        if dataset.column_names is None:
            raise InputError(f"{name}: its columns aren't known before it is read: give parquet or arrow files")
        self.name = name
        self.mapping = ColumnMapping(dataset.column_names, columns, language, folder, name)
        self.features = undecoded(dataset.features)
        self.conversions = text_conversions(dataset.features, self.mapping, name)

    def convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with the texts of typed columns."""
        return {name: self.conversions[name](v) if name in self.conversions else v for name, v in row.items()}


def undecoded(features: datasets.Features) -> datasets.Features:
    """Return the features with decoding switched off, so that images stay as they are stored.

    `datasets` would open any path or URL that a row holds, and decode rows before they are requested.
    """

    def without_decoding(feature: Any) -> Any:  # noqa: ANN401
        if isinstance(feature, dict):
            return {name: without_decoding(inner) for name, inner in feature.items()}
        if isinstance(feature, LISTS):
            return replace(feature, feature=without_decoding(feature.feature))
        decodes = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
        return replace(feature, decode=False) if decodes else feature

    return datasets.Features(without_decoding(dict(features)))


def text_conversions(features: datasets.Features, mapping: ColumnMapping, name: str) -> dict[str, Callable[[Any], Any]]:
    """Return the conversions of columns that hold numbers or classes instead of texts; warn about numbers.

    A class becomes its name. How a number was written is lost: a whole number is read as an int, because a column of
    ints with gaps is stored as floats, and a float of 16 or 32 bits with as many digits as identify it.

    Args:
        features: the split's.
        mapping: the columns of the fields.
        name: names the split in the warning.
    """
    for field in ("question", "answers", "question_types"):
        for column in mapping.fields.get(field, ()):
            kind = _item_feature(features.get(column))
            if isinstance(kind, datasets.Value) and kind.dtype.startswith(("float", "decimal", "date", "time", "bool")):
                rank_zero_warn(
                    f"{name}: column {column!r} holds {kind.dtype} instead of texts: how 1.0, 0.10 or a date was "
                    f"written is lost. Store texts, to train on what the page says."
                )
    conversions = {column: _conversion(features.get(column)) for column in mapping.text_columns}
    return {column: conversion for column, conversion in conversions.items() if conversion}


def _item_feature(feature: Any) -> Any:  # noqa: ANN401
    return _item_feature(feature.feature) if isinstance(feature, LISTS) else feature


def _conversion(feature: Any) -> Callable[[Any], Any] | None:  # noqa: ANN401
    if isinstance(feature, LISTS):
        of_item = _conversion(feature.feature)
        return of_item and (lambda values: values if values is None else [of_item(value) for value in values])
    if isinstance(feature, datasets.ClassLabel):
        return lambda label: None if label is None or label < 0 else feature.int2str(label)
    if isinstance(feature, datasets.Value) and feature.dtype.startswith("float"):
        dtype = np.dtype(feature.dtype).type
        return lambda number: number if number is None or number != number else _as_written(float(number), dtype)
    return None


def _as_written(number: float, dtype: type[np.floating[Any]]) -> int | str:
    return int(number) if number.is_integer() else str(dtype(number))
