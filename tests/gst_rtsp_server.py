"""Serve H.264 clips over RTSP as cameras do: in real time, without end, and without encoding anything again.

Run by the system's Python, which has GStreamer's bindings (Debian: python3-gi, gir1.2-gst-rtsp-server-1.0):

    /usr/bin/python3 gst_rtsp_server.py --mount /cam0=street.mp4 --mount /cam1=gate.mp4 --port 0

When it listens, it prints one line of JSON: {"port": 41235, "mounts": {"/cam0": {"frames": 250, "fps": 25.0}}}.
Commands come on stdin, and each is answered by one line of JSON: `freeze /cam0` keeps the connections of a mount
open and sends no picture, `thaw /cam0` goes on. The end of stdin ends the server.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

ROLE = "viewer"
LIVE = "( appsrc name=source is-live=true format=time ! rtph264pay name=pay0 pt=96 )"
READ = (
    "filesrc name=file ! parsebin ! h264parse config-interval=-1 ! video/x-h264,stream-format=byte-stream,alignment=au"
    " ! appsink name=units sync=false"
)


@dataclass(frozen=True)
class Clip:
    """The access units of a file, in decoding order; times in ns from the first one's decoding time."""

    caps: Gst.Caps
    units: tuple[Gst.Buffer, ...]
    dts_ns: tuple[int, ...]
    pts_ns: tuple[int, ...]
    length_ns: int

    @property
    def fps(self) -> float:
        return len(self.units) * Gst.SECOND / self.length_ns


def read_clip(path: Path) -> Clip:
    """Read all access units of an H.264 file into memory."""
    pipeline = Gst.parse_launch(READ)
    pipeline.get_by_name("file").set_property("location", str(path))
    sink = pipeline.get_by_name("units")
    pipeline.set_state(Gst.State.PLAYING)
    try:
        samples = []
        while sample := sink.emit("pull-sample"):
            samples.append(sample)
    finally:
        pipeline.set_state(Gst.State.NULL)
    if not samples:
        raise SystemExit(f"{path}: no H.264 access units found; re-encode it to H.264 first")
    units = [sample.get_buffer() for sample in samples]
    # A file without B-frames may leave out the decoding times: they are the presentation times then.
    dts = [unit.dts if unit.dts != Gst.CLOCK_TIME_NONE else unit.pts for unit in units]
    last = units[-1].duration if units[-1].duration != Gst.CLOCK_TIME_NONE else dts[-1] - dts[-2]
    return Clip(
        caps=samples[0].get_caps(),
        units=tuple(units),
        dts_ns=tuple(time_ns - dts[0] for time_ns in dts),
        pts_ns=tuple(unit.pts - dts[0] for unit in units),
        length_ns=dts[-1] - dts[0] + last,
    )


class Feeder:
    """Push a clip into one media's appsrc, each access unit when its time has come, with times that go on over loops.

    Runs in the main loop; only `stop` is called from another thread (the RTSP server's).
    """

    def __init__(self, camera: Camera, media: GstRtspServer.RTSPMedia, client: int) -> None:
        self.camera = camera
        self.client = client
        self.pipeline = media.get_element().get_parent()
        self.source = media.get_element().get_by_name("source")
        self.source.set_property("caps", camera.clip.caps)
        self.count = 0
        self.shift_ns = -1  # running time of the clip's start, in the present loop; unknown before the clock runs
        self.stopped = False
        GLib.idle_add(self._push_due)

    def stop(self, *_: object) -> None:
        self.stopped = True

    def _push_due(self) -> bool:
        """Push what is due, and come back when the next access unit is."""
        if self.stopped:
            return False
        wait_ns = 10 * Gst.MSECOND
        if (now_ns := self._running_time_ns()) >= 0:
            if self.shift_ns < 0:
                self.shift_ns = now_ns
            while (wait_ns := self._due_ns() - now_ns) <= 0:
                if self.camera.frozen:
                    # Time goes by without pictures: the next one is due one interval after the thaw.
                    self.shift_ns += now_ns - self._due_ns() + round(Gst.SECOND / self.camera.clip.fps)
                elif not self._push():
                    return False
        GLib.timeout_add(-(-wait_ns // Gst.MSECOND), self._push_due)
        return False

    def _running_time_ns(self) -> int:
        clock, base = self.pipeline.get_clock(), self.pipeline.get_base_time()
        return clock.get_time() - base if clock and base else -1

    def _due_ns(self) -> int:
        return self.shift_ns + self.camera.clip.dts_ns[self.count % len(self.camera.clip.units)]

    def _push(self) -> bool:
        clip, index = self.camera.clip, self.count % len(self.camera.clip.units)
        template = clip.units[index]
        unit = template.copy_region(Gst.BufferCopyFlags.FLAGS | Gst.BufferCopyFlags.MEMORY, 0, template.get_size())
        unit.dts = self.shift_ns + clip.dts_ns[index]
        unit.pts = self.shift_ns + clip.pts_ns[index]
        pts_s = unit.pts / Gst.SECOND
        self.camera.log(client=self.client, count=self.count, index=index, pts_s=pts_s, sent_at=time.time())
        self.count += 1
        if index == len(clip.units) - 1:
            self.shift_ns += clip.length_ns
        return self.source.emit("push-buffer", unit) == Gst.FlowReturn.OK


class Camera:
    """One mount: a clip, who watches it, and whether it is frozen."""

    def __init__(self, mount: str, clip: Clip, sent_log: TextIO | None) -> None:
        self.mount = mount
        self.clip = clip
        self.frozen = False
        self.num_clients = 0
        self._sent_log = sent_log

    def serve(self, media: GstRtspServer.RTSPMedia, sender_report_s: float) -> None:
        """Feed a media that a client has just asked for."""
        feeder = Feeder(self, media, self.num_clients)
        self.num_clients += 1
        media.connect("unprepared", feeder.stop)
        media.connect("prepared", hasten_sender_reports, sender_report_s)

    def log(self, **sent: Any) -> None:
        if self._sent_log:
            print(json.dumps({"mount": self.mount, **sent}), file=self._sent_log, flush=True)


def hasten_sender_reports(media: GstRtspServer.RTSPMedia, interval_s: float) -> None:
    """Shorten the interval of RTCP sender reports, which is 5 s by default.

    The reports carry the wall clock (rtpbin's default `ntp-time-source=ntp`), from which clients get the capture time.
    """
    elements = media.get_element().get_parent().children
    rtpbin = next(element for element in elements if element.get_factory().get_name() == "rtpbin")
    session = rtpbin.emit("get-internal-session", 0)
    session.set_property("rtcp-min-interval", round(interval_s * Gst.SECOND))


def require_password(server: GstRtspServer.RTSPServer, user: str, password: str, digest: bool) -> None:
    """Refuse whoever does not name the user and password."""
    token = GstRtspServer.RTSPToken()
    token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, ROLE)
    auth = GstRtspServer.RTSPAuth()
    if digest:
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(user, password, token)
    else:
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)


def make_factory(camera: Camera, options: argparse.Namespace) -> GstRtspServer.RTSPMediaFactory:
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(LIVE)
    factory.set_shared(options.shared)
    factory.connect("media-configure", lambda _, media: camera.serve(media, options.sender_report_s))
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_permission_for_role(ROLE, GstRtspServer.RTSP_PERM_MEDIA_FACTORY_ACCESS, True)
    permissions.add_permission_for_role(ROLE, GstRtspServer.RTSP_PERM_MEDIA_FACTORY_CONSTRUCT, True)
    factory.set_permissions(permissions)
    return factory


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def obey(loop: GLib.MainLoop, cameras: dict[str, Camera]) -> bool:
    """Carry out one line of stdin."""
    line = sys.stdin.readline()
    if not line:
        loop.quit()
        return False
    verb, _, mount = line.strip().partition(" ")
    if verb not in ("freeze", "thaw") or mount not in cameras:
        say(error=f"expected 'freeze' or 'thaw' and one of {sorted(cameras)}, got {line!r}")
    else:
        cameras[mount].frozen = verb == "freeze"
        say(mount=mount, frozen=cameras[mount].frozen)
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mount", action="append", required=True, metavar="/NAME=FILE")
    parser.add_argument("--port", default="0", help="0 takes a free one")
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--digest", action="store_true", help="digest instead of basic authentication")
    parser.add_argument("--shared", action="store_true", help="one feed for all clients of a mount, joined where it is")
    parser.add_argument("--sender-report-s", type=float, default=0.5, help="about how often RTCP tells the wall clock")
    parser.add_argument("--log-sent", type=Path, metavar="FILE", help="write when each access unit was sent")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(options.port)
    sent_log = options.log_sent.open("w") if options.log_sent else None
    clips: dict[str, Clip] = {}
    cameras: dict[str, Camera] = {}
    for mount, _, file in (argument.partition("=") for argument in options.mount):
        if file not in clips:
            clips[file] = read_clip(Path(file))
        cameras[mount] = Camera(mount, clips[file], sent_log)
        server.get_mount_points().add_factory(mount, make_factory(cameras[mount], options))
    if options.user:
        require_password(server, options.user, options.password, options.digest)
    if not server.attach(None):
        raise SystemExit(f"port {options.port} is taken")
    loop = GLib.MainLoop()
    GLib.io_add_watch(sys.stdin, GLib.PRIORITY_DEFAULT, GLib.IO_IN | GLib.IO_HUP, lambda *_: obey(loop, cameras))
    say(
        port=server.get_bound_port(),
        mounts={name: {"frames": len(camera.clip.units), "fps": camera.clip.fps} for name, camera in cameras.items()},
    )
    loop.run()


if __name__ == "__main__":
    main()
