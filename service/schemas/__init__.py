"""What crosses the wire, as the server sends it and the client reads it.

The body of `POST /v1/jobs` is `workers.contract.JobSpec`, that of `POST /v1/plans` is `PreviewBody`. Readers pass over
fields they do not know, and take `status` as text: a newer server may know more states.
"""

from service.schemas.access import Key, KeyBody, Me, User, UserBody, UserChange
from service.schemas.base import FieldProblem, Health, Page, Problem, Wire
from service.schemas.data import (
    MAX_PREDICT_IMAGES,
    Dataset,
    DatasetBody,
    DatasetClass,
    Model,
    PredictedClass,
    Prediction,
    PredictionList,
    Sample,
    SampleList,
)
from service.schemas.jobs import (
    Artifact,
    Checkpoint,
    Event,
    Job,
    JobError,
    LedgerView,
    MetricsPage,
    PlanView,
    Progress,
    RunAnswer,
    RunEvents,
    Usage,
)
from service.schemas.planning import (
    MAX_DEVICES,
    Device,
    DeviceBody,
    DeviceList,
    LinkBody,
    PairBody,
    Preview,
    PreviewBody,
)
from service.schemas.webhooks import Delivery, Webhook, WebhookBody

__all__ = [
    "MAX_DEVICES",
    "MAX_PREDICT_IMAGES",
    "Artifact",
    "Checkpoint",
    "Dataset",
    "DatasetBody",
    "DatasetClass",
    "Delivery",
    "Device",
    "DeviceBody",
    "DeviceList",
    "Event",
    "FieldProblem",
    "Health",
    "Job",
    "JobError",
    "Key",
    "KeyBody",
    "LedgerView",
    "LinkBody",
    "Me",
    "MetricsPage",
    "Model",
    "Page",
    "PairBody",
    "PlanView",
    "PredictedClass",
    "Prediction",
    "PredictionList",
    "Preview",
    "PreviewBody",
    "Problem",
    "Progress",
    "RunAnswer",
    "RunEvents",
    "Sample",
    "SampleList",
    "Usage",
    "User",
    "UserBody",
    "UserChange",
    "Webhook",
    "WebhookBody",
    "Wire",
]
