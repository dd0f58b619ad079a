"""Why languages interfere: gradient conflict, language-specific parameters, interference itself (paper, section 3)."""
