"""One of two processes: log-probs of half a batch through DistributedDataParallel, gradients written by the first.

torchrun --nproc_per_node 2 tests/integrations/ddp_worker.py FOLDER        (FOLDER/model, FOLDER/batch.pt)
"""

import sys
from pathlib import Path

import torch
import transformers as tf
from torch.nn.parallel import DistributedDataParallel

import fastalign


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "model")
    wrapped = DistributedDataParallel(model)
    batch = torch.load(folder / "batch.pt")
    with fastalign.patch(wrapped):
        part = {name: tensor[rank : rank + 1] for name, tensor in batch.items()}
        wrapped.logps(**part).logps.sum().backward()
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
