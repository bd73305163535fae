"""The Python client: submit segmentations and trainings to a Ray cluster, or run them here, and follow them."""

from volseg.client.asynchronous import AsyncClient, AsyncJob
from volseg.client.client import Client
from volseg.client.job import Job, JobResult
from volseg.client.state import JobStatus
from volseg.execution.webhook import check_signature
from volseg.training.progress import TrainResult

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job", "JobResult", "JobStatus", "TrainResult", "check_signature"]
