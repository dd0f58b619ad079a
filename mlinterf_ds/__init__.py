"""Pretrain multilingual masked language models whose language-specific modules help every language."""

import logging
import warnings

# megatron-core falls back to torch where these are missing, which is what we want on a CPU.
for _message in (r".*Transformer Engine", r".*[Aa]pex is not installed", r".*CUDA_DEVICE_MAX_CONNECTIONS"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning, module=r"megatron\.")
# It reports every feed-forward module that isn't its own MLP class, which a routed one is not.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
