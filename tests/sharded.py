"""A task's train.py in one of two processes that shard its model on a CPU: `python tests/sharded.py TASK [FLAG ...]`.

Started by task_runs.py. The environment is what `accelerate launch --config_file accelerate/fsdp.yaml` gives. accelerate 1.15
makes FSDP of the processes of GPUs alone: these two, once gloo has joined them, say that they are such. All else is as on GPUs.
"""

import os
import runpy
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from checkout import ROOT

from accelerate import PartialState
from shared.training import sharding

join, prepare = PartialState.__init__, sharding.fsdp2_prepare_model


def join_as_gpus(self, *args, **kwargs) -> None:
    join(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def prepare_and_tell(accelerator, model):
    prepare(accelerator, model)
    held, whole = (sum(p.numel() for p in each) for each in (map(local, model.parameters()), model.parameters()))
    print(f"holds {held / whole:.2f} of the weights")


def local(parameter):
    return parameter.to_local()  # there is no such method where nothing was sharded


words = ["--config_file", str(ROOT / "accelerate" / "fsdp.yaml"), "--main_process_port", "0", "train.py"]
arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
given = prepare_multi_gpu_env(arguments)
os.environ |= {name: value for name, value in given.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
PartialState.__init__, sharding.fsdp2_prepare_model = join_as_gpus, prepare_and_tell
script = ROOT / "tasks" / sys.argv[1] / "train.py"
sys.argv, sys.path[0] = [str(script), *sys.argv[2:]], str(script.parent)
runpy.run_path(str(script), run_name="__main__")
