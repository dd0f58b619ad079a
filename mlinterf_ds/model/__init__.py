"""The encoder: megatron-core's tensor-parallel Transformer with language-routed modules.

megatron-core warns at import, and once at run time, about kernels that only matter on a GPU; nothing here needs them.
"""

import logging
import warnings

for _message in (r".*Transformer Engine", r".*[Aa]pex is not installed", r".*CUDA_DEVICE_MAX_CONNECTIONS"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning, module=r"megatron\.")
# it reports every feed-forward module that isn't its own MLP class, which a routed one is not
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
