"""What follows from predictions, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from eval.predictions import Predictions, answers


def predictions(logits: list, labels: list[int]) -> Predictions:
    keys = [f"image{number}" for number in range(len(labels))]
    return Predictions.of([answers(torch.tensor(logits), torch.tensor(labels), keys)])


def confident(*probabilities: float, labels: tuple[int, ...]) -> Predictions:
    """Two classes, the first of them with these probabilities, all of which are above one half."""
    odds = np.log(np.array(probabilities) / (1 - np.array(probabilities)))
    return predictions([[float(value), 0.0] for value in odds], list(labels))


def test_accuracies_are_percent_of_the_images():
    found = predictions([[6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6], [0.0, 9, 8, 7, 6, 5, 4]], [0, 1, 2])
    assert (found.n, found.top1, found.top5) == (3, 100 / 3, 200 / 3)
    assert found.classes.tolist() == [[0, 1, 2, 3, 4], [6, 5, 4, 3, 2], [1, 2, 3, 4, 5]]


def test_calibration_error_weighs_each_bin_by_its_images():
    # [0.533, 0.6): 0.55 and 0.59, both right; [0.8, 0.867): 0.85, wrong
    found = confident(0.55, 0.59, 0.85, labels=(0, 0, 1))
    assert found.calibration_error == pytest.approx(100 * (abs(0.55 - 1 + 0.59 - 1) + 0.85) / 3)


def test_gaps_within_a_bin_cancel():
    assert confident(0.75, 0.75, 0.75, 0.75, labels=(0, 0, 0, 1)).calibration_error == pytest.approx(0, abs=1e-4)


def test_certainty_falls_into_the_last_bin():
    assert predictions([[100.0, 0.0]], [0]).calibration_error == 0


def test_nan_is_never_correct_and_has_no_confidence():
    found = predictions([[float("nan"), 0.0], [float("nan"), float("nan")]], [0, 1])
    assert (found.top1, found.top5, found.probabilities.tolist()) == (0, 0, [0, 0])


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_classes_is_an_error(label):
    with pytest.raises(ValueError, match=f"labels run from .*{label}.*, but the model has 2 classes"):
        answers(torch.zeros(2, 2), torch.tensor([label, 1]), ["a", "b"])


def test_a_file_has_a_line_an_image():
    text = predictions([[0.0, 0.0, 9.0], [float("nan"), 0.0, 0.0]], [2, 0]).to_csv()
    assert text == "key,label,probability,top5\nimage0,2,0.999753,2 0 1\nimage1,0,0.000000,-1 1 2\n"


def test_the_digest_names_images_and_labels():
    found = predictions([[1.0, 0.0], [0.0, 1.0]], [0, 1])
    assert found.set_digest == predictions([[0.0, 1.0], [0.0, 1.0]], [0, 1]).set_digest
    assert found.set_digest != predictions([[1.0, 0.0], [0.0, 1.0]], [0, 0]).set_digest
