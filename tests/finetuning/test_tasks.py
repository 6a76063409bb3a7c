"""Loss and metrics of each task against plain definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

from dnazen.finetuning.tasks import Classification, MultiLabel, PerBase, Regression


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_per_base_is_a_loop_over_bases(rng):
    """Each base counts once, with its token's logits: loss and metrics."""
    task = PerBase(3)
    bases = rng.integers(0, 5, 30)  # of each token; special tokens have none
    classes = rng.integers(0, 3, bases.sum())
    logits = rng.normal(size=(30, 3)).astype(np.float32)
    token = np.repeat(np.arange(30), bases)
    counts = np.zeros((30, 3), np.float32)
    for t, c in zip(token, classes):
        counts[t, c] += 1
    labels = task.stack([counts[:10], counts[10:]])
    weights = torch.tensor([0.5, 1.0, 3.0])
    each = torch.from_numpy(logits)[token]
    for weight in (None, weights):
        expected = F.cross_entropy(each, torch.from_numpy(classes), weight)
        torch.testing.assert_close(task.loss(torch.from_numpy(logits), labels, weight), expected)
    found, guessed = task.metrics(logits, counts), logits.argmax(-1)[token]
    assert found["mcc"] == pytest.approx(matthews_corrcoef(classes, guessed))
    assert found["accuracy"] == pytest.approx(accuracy_score(classes, guessed))
    assert found["f1"] == pytest.approx(f1_score(classes, guessed, average="macro"))


def test_classification(rng):
    task, labels = Classification(2), rng.integers(0, 2, 50)
    logits = rng.normal(size=(50, 2)).astype(np.float32)
    found = task.metrics(logits, labels)
    assert found["mcc"] == pytest.approx(np.corrcoef(labels, logits.argmax(-1))[0, 1])
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    loss = task.loss(torch.from_numpy(logits), task.stack(list(labels)), torch.tensor([1.0, 2.0]))
    weights = np.where(labels == 1, 2.0, 1.0)
    chosen = torch.from_numpy(logits).log_softmax(-1).numpy()[np.arange(50), labels]
    assert float(loss) == pytest.approx(-(weights * chosen).sum() / weights.sum(), rel=1e-6)


def test_balanced_weights_make_classes_equal():
    weights = Classification(2).balanced_weights([np.array(c) for c in (0, 0, 0, 1)])
    assert weights == pytest.approx([4 / 6, 2.0])


def test_regression_and_what_is_undefined(rng):
    task, truth = Regression(1), rng.normal(size=(20, 1)).astype(np.float32)
    found = task.metrics(2 * truth + 1, truth)
    assert found["pearson"] == pytest.approx(1) and found["spearman"] == pytest.approx(1)
    assert found["mse"] == pytest.approx(float(((truth + 1) ** 2).mean()), rel=1e-6)
    assert task.metrics(np.zeros_like(truth), truth)["pearson"] == 0
    assert Classification(2).metrics(np.array([[1.0, 0.0]] * 4), np.zeros(4, int))["mcc"] == 0


def test_multi_label_is_the_mean_of_its_labels(rng):
    task, logits = MultiLabel(3), rng.normal(size=(40, 3)).astype(np.float32)
    labels = rng.integers(0, 2, (40, 3)).astype(np.float32)
    columns = [matthews_corrcoef(labels[:, i], logits[:, i] > 0) for i in range(3)]
    assert task.metrics(logits, labels)["mcc"] == pytest.approx(np.mean(columns))
    expected = F.binary_cross_entropy(torch.from_numpy(logits).sigmoid(), torch.from_numpy(labels))
    torch.testing.assert_close(task.loss(torch.from_numpy(logits), task.stack(list(labels))), expected)
