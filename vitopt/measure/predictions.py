"""Predictions per image: kept beside each record so that any two can be compared later."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.records import Outputs

PREDICTIONS_FILE = "predictions.parquet"


@dataclass(frozen=True)
class Predictions:
    """Outputs of one variant over one image set.

    `ids` and `image_sha256` name the images; `labels`: (images,), or (images, labels) of 0 and 1 where an image has
    any number of them; `logits`: (images, outputs), float32, and `outputs` what they are. `groups` names the group of
    each image where images of one group depend on each other. `escalated`: (images,), those that an adaptive model gave
    its second pass.
    """

    ids: tuple[str, ...]
    image_sha256: tuple[str, ...]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    groups: tuple[str, ...] | None = None
    outputs: Outputs = "classes"
    escalated: NDArray[np.bool_] | None = None

    @property
    def why_no_classes(self) -> str | None:
        """Why no output is an image's class, so that top-1, agreement and KL mean nothing; None where one is."""
        if self.outputs == "embedding":
            return "the model gives embeddings, not a logit for each class"
        if self.labels.ndim > 1:
            return "an image can have several labels, so no single class is right"
        if self.outputs == "labels":
            return "the model's labels do not exclude each other, so no class is its answer"
        return None

    @property
    def classes(self) -> NDArray[np.int64]:
        """(images,): the class of highest logit, the lower index on ties."""
        return self.logits.argmax(axis=1)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(images,): whether the class is the label."""
        return self.classes == self.labels


def save_predictions(predictions: Predictions, folder: Path) -> None:
    """Write `predictions.parquet` into `folder`: image id, image hash, label, logits, group and path if there are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image": list(predictions.ids),
        "image_sha256": list(predictions.image_sha256),
        "label": predictions.labels if predictions.labels.ndim == 1 else _rows(predictions.labels),
        "logits": _rows(predictions.logits),
    }
    if predictions.groups is not None:
        columns["group"] = list(predictions.groups)
    if predictions.escalated is not None:
        columns["escalated"] = predictions.escalated
    table = pa.table(columns).replace_schema_metadata({"outputs": predictions.outputs})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(folder / PREDICTIONS_FILE, buffer.getvalue())


def _rows(matrix: NDArray[Any]) -> Any:
    """(images, width) as a column of lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(table: Any, column: str, kind: type[np.generic]) -> NDArray[Any]:
    return np.asarray(table[column].combine_chunks().values, dtype=kind).reshape(len(table), -1)


def load_predictions(folder: Path) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        RecordError: missing or not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / PREDICTIONS_FILE
    try:
        table = pq.read_table(path)
        single = pa.types.is_integer(table.schema.field("label").type)
        return Predictions(
            ids=tuple(table["image"].to_pylist()),
            image_sha256=tuple(table["image_sha256"].to_pylist()),
            labels=np.asarray(table["label"], dtype=np.int64) if single else _matrix(table, "label", np.int64),
            logits=_matrix(table, "logits", np.float32),
            groups=tuple(table["group"].to_pylist()) if "group" in table.column_names else None,
            escalated=np.asarray(table["escalated"], dtype=bool) if "escalated" in table.column_names else None,
            outputs=(table.schema.metadata or {}).get(b"outputs", b"classes").decode(),
        )
    except FileNotFoundError as error:
        raise RecordError(f"no predictions at {path}: evaluate with --output to keep them") from error
    except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as predictions: {error}") from error
