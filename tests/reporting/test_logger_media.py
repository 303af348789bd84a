"""The answers in the run's loggers; MLflow's and Comet's clients are replaced by records of their calls."""

import csv
import io

import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from idefics_lit.evaluation.answer import Answer
from idefics_lit.reporting.logger_media import log_answers
from idefics_lit.reporting.page_gallery import Card

HEADER = ["question", "prediction", "references", "score", "question_types"]
ROWS = [["Who | when?", "x", "Ann | Bo", 0.0, "form"], ["What?", "a\nb", "ab", 0.75, "form | table"]]


@pytest.fixture
def cards():
    Image.new("L", (200, 100), 255).save(file := io.BytesIO(), "JPEG")
    answers = [
        Answer(i, question, prediction, references.split(" | "), score, types.split(" | "), -1.0, 4, index=i)
        for i, (question, prediction, references, score, types) in enumerate(ROWS)
    ]
    return [Card([answers[0]], [file.getvalue()]), Card([answers[1]], (), "no image")]


class MlflowClient:
    """The methods of ``mlflow.MlflowClient`` that are called, with its parameters."""

    def __init__(self):
        self.files = {}

    def log_text(self, run_id, text, artifact_file):
        self.files[run_id, artifact_file] = text

    def log_image(self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None):
        self.files[run_id, artifact_file] = image


class FakeMLFlowLogger(MLFlowLogger):
    run_id, experiment = "7", None

    def __init__(self):
        Logger.__init__(self)
        self.experiment = MlflowClient()


def test_mlflow(cards):
    logger = FakeMLFlowLogger()
    log_answers(logger, "val", cards, 3)
    files = logger.experiment.files
    assert files.keys() == {("7", "val/answers.csv"), ("7", "val/worst/1.png")}
    header, *rows = csv.reader(io.StringIO(files["7", "val/answers.csv"]))
    assert header == HEADER
    assert rows == [[*map(str, row)] for row in ROWS]
    assert files["7", "val/worst/1.png"].size[0] == 200 < files["7", "val/worst/1.png"].size[1] + 100


class CometExperiment:
    """The methods of ``comet_ml.CometExperiment`` that are called, with its parameters."""

    def __init__(self):
        self.tables, self.images = {}, {}

    def log_table(self, filename, tabular_data=None, headers=False):
        self.tables[filename] = [headers, *tabular_data]

    def log_image(self, image_data, name=None, step=None):
        self.images[name, step] = image_data


class FakeCometLogger(CometLogger):
    experiment = None

    def __init__(self):
        Logger.__init__(self)
        self.experiment = CometExperiment()


def test_comet(cards):
    logger = FakeCometLogger()
    log_answers(logger, "test", cards, 3)
    assert logger.experiment.tables == {"test_answers.csv": [HEADER, *ROWS]}
    assert logger.experiment.images.keys() == {("test/worst/1", 3)}


def test_tensorboard(cards, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_answers(logger, "val", cards, 3)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    (text,) = events.Tensors("val/answers/text_summary")
    assert text.step == 3
    header, _, first, second = text.tensor_proto.string_val[0].decode().splitlines()
    assert header == "| question | prediction | references | score | question_types |"
    assert first == r"| Who \| when? | x | Ann \| Bo | 0.0 | form |"
    assert second == r"| What? | a b | ab | 0.75 | form \| table |"
    (image,) = events.Images("val/worst/1")
    assert image.width == 200


def test_other_loggers_are_left_alone(cards, tmp_path):
    log_answers(CSVLogger(tmp_path), "val", cards, 3)
    assert not [*tmp_path.rglob("*")]
