"""streamd: RTSP cameras in, detections and masks on ZeroMQ and Redis out."""

__version__ = "0.1.0"
