"""Our masks against a plain port of the published procedure: layer by layer, one sample at a time, every layer twice."""

import pytest
import torch

from bench.antidote_port import port_masks, port_scores
from tests.ml.conftest import TARGETS
from tests.ml.recovery.conftest import tune
from workers.ml.checkpoints import load_base
from workers.ml.recovery.calibration import encode_answers
from workers.ml.recovery.methods import antidote
from workers.ml.recovery.specs import AntidoteSpec
from workers.ml.settings import LoraSettings
from workers.ml.types import Silent


@pytest.mark.parametrize("shape", ["gqa", "llama", "qkv_bias"])
def test_masks_are_those_of_the_published_procedure(shape, base_folders, inputs):
    tuned = tune(load_base(base_folders(shape)), LoraSettings(rank=8, alpha=16, target_modules=TARGETS))
    rows = encode_answers(tuned, inputs.harmful)
    spec = AntidoteSpec(granularity="row", compat=True, norm="rms", tokens="all")
    ours, theirs = antidote.factor_scores(tuned, spec, rows, Silent()), port_scores(tuned, rows)
    assert set(theirs) == set(ours) == set(tuned.vector.names)
    for name, score in theirs.items():
        assert torch.allclose(ours[name], score, rtol=1e-5, atol=1e-8)
    path = antidote.prepare(tuned, spec, inputs, Silent())
    for alpha in (0.01, 0.05, 0.1, 0.2, 0.3):
        masks = port_masks(theirs, alpha)
        found = {name: part == 0 for name, part in tuned.vector.split(path.at(alpha).factors).items()}
        assert all(torch.equal(found[name], masks[name]) for name in masks)
