"""A DPO run on a tiny model that saves after every step. Run in a process of its own, which is killed.

Set beforehand: output_dir, resume, max_steps, errors_path (stderr goes there), result_path (weights at the end),
loader_workers (then it leads a group of processes).
"""

import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from fastalign.trainers import DPOConfig, DPOTrainer

os.dup2(os.open(errors_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # noqa: F821
os.dup2(2, 1)
os.fsync = lambda descriptor: None  # a kill is no power cut
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background has not
if loader_workers:  # noqa: F821
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # what a script has, not a process of a fork server
tf.utils.logging.disable_progress_bar()
disable_progress_bars()
try:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=32, pad_token_id=0, eos_token_id=1, **sizes))
    rng = np.random.default_rng(0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: rng.integers(3, 32, 5).tolist() for name in columns} | {"row": i} for i in range(64)]
    settings = {
        "output_dir": output_dir, "max_steps": max_steps, "save_strategy": "steps", "save_steps": 1,  # noqa: F821
        "save_total_limit": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3,
        "logging_steps": 10, "per_device_train_batch_size": 2, "precompute_ref_log_probs": False,
        "sync_ref_model": True, "ref_model_sync_steps": 2, "gradient_checkpointing": False,
        "dataloader_num_workers": loader_workers,  # noqa: F821
    }  # fmt: skip
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    trainer = DPOTrainer(
        model, args=DPOConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    there = Path(output_dir).is_dir() and any(Path(output_dir).glob("checkpoint-*"))  # noqa: F821
    trainer.train(resume_from_checkpoint=bool(resume and there))  # noqa: F821
    save_file(dict(model.state_dict()), result_path)  # noqa: F821
except KeyboardInterrupt:
    sys.exit(130)
except Exception:
    traceback.print_exc()
    sys.exit(1)
