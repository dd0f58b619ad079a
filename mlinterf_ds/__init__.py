"""Pretrain multilingual masked language models whose language-specific modules help every language."""

import warnings

# megatron-core falls back to torch where these are missing, which is what we want on a CPU.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
