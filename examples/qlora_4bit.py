"""QLoRA: a base model quantised to 4 bits by bitsandbytes, frozen under a LoRA adapter.

    python examples/qlora_4bit.py [--steps 30]           (pip install bitsandbytes)

transformers leaves the head out of quantisation, which is what the fused head needs: a head that was quantised all the
same is refused by name. `fastalign.DPOTrainer` takes `quantization_config` and `peft_config` as TRL's does.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import LoraConfig
from shop import build_model, build_tokenizer, text_pairs
from transformers import BitsAndBytesConfig

from fastalign import DPOConfig, DPOTrainer


def main() -> None:
    import bitsandbytes as bnb

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        build_model(tokenizer, seed=0).save_pretrained(f"{folder}/base")  # a checkpoint stands in for a real one
        arguments = DPOConfig(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-3, beta=0.3, logging_steps=5,
            lr_scheduler_type="constant", cache_dir=f"{folder}/reference", save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=f"{folder}/base",
            args=arguments,
            train_dataset=text_pairs(16 * steps),
            processing_class=tokenizer,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        )
        quantised = sum(isinstance(module, bnb.nn.Linear4bit) for module in trainer.model.modules())
        print(f"{quantised} layers in 4 bits, head in {trainer.model.get_output_embeddings().weight.dtype}")
        trainer.train()
    losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
