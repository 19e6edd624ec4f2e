"""The paper's other families, one file each: what differs from LLaVA, nothing else."""
