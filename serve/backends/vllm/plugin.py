"""What vLLM calls in each of its processes before anything else (`vllm.general_plugins`)."""

import multiprocessing
import os
import threading
import time
from typing import Any

from serve.environment import leaves_with_parent

PARENT_CHECK_S = 1.0


def register() -> None:
    """Make our models, weights and side networks known to vLLM; calling it again does no harm.

    Nothing is loaded yet, and an engine that was not started for us behaves as ever.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import (
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    from serve.backends.vllm import linears, loader, models

    if loader.NAME in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    if multiprocessing.parent_process() is not None and leaves_with_parent(os.environ):
        threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    register_quantization_config(linears.NAME)(linears.ProaQuantizationConfig)
    register_model_loader(loader.NAME)(loader.ProaLoader)
    for architecture in models.BASES:
        name = f"{models.PREFIX}{architecture}"
        ModelRegistry.register_model(name, f"{models.__name__}:{name}")
    make_lora_manager: Any = mixin.LRUCacheWorkerLoRAManager

    def make_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from serve.backends.vllm.settings import read_settings
        from serve.backends.vllm.side_manager import SideManager

        if read_settings(vllm_config.additional_config) is None:
            return make_lora_manager(vllm_config, *args, **kwargs)
        return SideManager(vllm_config, *args, **kwargs)

    mixin.LRUCacheWorkerLoRAManager = make_manager


def leave_with_parent(parent: int) -> None:
    """End this process once its parent has died: vLLM's engine would keep its memory for ever.

    Args:
        parent: process id.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)
