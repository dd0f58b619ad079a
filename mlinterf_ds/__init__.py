"""Pretrain multilingual masked language models whose language-specific modules help every language."""
