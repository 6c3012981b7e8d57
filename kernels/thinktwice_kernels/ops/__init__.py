"""The ops as torch.library knows them: ``torch.ops.thinktwice_kernels.*``."""
