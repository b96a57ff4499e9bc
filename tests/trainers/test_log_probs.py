"""Log-probs of a batch at the rows that count, in every layout."""

import pytest
import torch

from fastalign.models import enable_segments
from fastalign.trainers.log_probs import batch_logps, sequence_sums


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_log_probs_are_the_logits(kit, layout):
    trainer = kit.trainer(kit.model(), kit.labelled(5), loss_type="kto")
    enable_segments(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    with torch.no_grad():
        got = batch_logps(trainer.model, batch, trainer.args, layout)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked = logits.double().log_softmax(-1).gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    counted = batch["targets"] != -100
    torch.testing.assert_close(got.double(), picked[counted], rtol=1e-4, atol=1e-4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, batch["ref_per_token_logps"], rtol=1e-4, atol=1e-4)  # its own reference
    sums = sequence_sums(got, batch)
    torch.testing.assert_close(sums.double(), torch.where(counted, picked, 0.0).sum(1), rtol=1e-4, atol=1e-4)
