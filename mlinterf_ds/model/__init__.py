from mlinterf_ds.runtime import parallel as parallel  # imports megatron first, without torch's compiler
