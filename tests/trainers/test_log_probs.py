"""Log-probs of a padded batch, and their way to the rows that count and back."""

import torch

from fastalign.trainers.log_probs import at_rows, batch_logps, from_rows


def test_log_probs_are_the_logits(kit):
    trainer = kit.trainer(kit.model(), kit.labelled(5), loss_type="kto")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    with torch.no_grad():
        got = batch_logps(trainer.model, batch, trainer.args)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    counted = batch["targets"] != -100
    picked = logits.double().log_softmax(-1).gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(got.double(), torch.where(counted, picked, 0.0), rtol=1e-4, atol=1e-4)
    assert got.dtype == torch.float32

    rows = at_rows(got, batch)
    assert rows.shape == batch["ref_per_token_logps"].shape
    torch.testing.assert_close(rows, batch["ref_per_token_logps"], rtol=1e-4, atol=1e-4)  # its own reference
    assert torch.equal(from_rows(rows, batch), got)
