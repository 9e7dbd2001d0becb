from famc.job import Job

__all__ = ["Job"]
