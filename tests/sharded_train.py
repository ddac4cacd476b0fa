# SPDX-License-Identifier: Apache-2.0
"""`firstlm train` with FSDP2 on the CPU, for test_processes.py.

On the CPU accelerate leaves its FSDP plugin out without a word, so layers are split here, at the
moment when accelerate would: before the first optimizer is made.
"""

from __future__ import annotations

import sys

from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, fully_shard

from firstlm.cli import main
from firstlm.trainer import FirstTrainer

create_optimizer = FirstTrainer.create_optimizer


def split_then_create(self, *args):
    if not isinstance(self.first, FSDPModule):
        for layer in self.first.routing.stack.modules:
            fully_shard(layer)
        fully_shard(self.first)
    return create_optimizer(self, *args)


FirstTrainer.create_optimizer = split_then_create
Accelerator.prepare_model = lambda self, model, *args, **kwargs: model  # no DDP around it

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
