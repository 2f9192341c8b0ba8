"""A real S3 server on loopback: one-node Ceph with its gateway (Debian's radosgw, ceph-mon, ceph-osd, ceph-mgr)."""

import os
import signal
import subprocess
import urllib.request
import uuid
from pathlib import Path

from waiting import await_that

KEY, SECRET = "distrain-test-key", "distrain-test-secret"
PORT, MONITOR = 9012, 13310
PROGRAMS = (
    "ceph-mon",
    "ceph-osd",
    "ceph-mgr",
    "radosgw",
    "radosgw-admin",
    "ceph-authtool",
    "monmaptool",
    "ceph",
)

CONFIG = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor}
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
osd objectstore = bluestore
bluestore block size = 2147483648
osd memory target = 1073741824
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
keyring = {folder}/keyring
[mon]
mon data = {folder}/mon
# By default a monitor does not start on a disk of which less than 5 % is free.
mon data avail warn = 1
mon data avail crit = 0
[osd]
osd data = {folder}/osd
[mgr]
mgr data = {folder}/mgr
mgr initial modules =
[client.rgw]
rgw data = {folder}/rgw
# Without tcp_nodelay each small GET takes 44 ms.
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw run sync thread = false
"""


def installed() -> bool:
    return all(
        any((Path(p) / program).exists() for p in os.environ["PATH"].split(":"))
        for program in PROGRAMS
    )


class Ceph:
    """Up after `up`; `down` ends every process of it by its pid."""

    url = f"http://127.0.0.1:{PORT}"

    def __init__(self, folder: Path) -> None:
        self._folder, self._config = folder, str(folder / "ceph.conf")

    def up(self) -> None:
        folder = self._folder
        for name in ("mon", "osd", "mgr", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True)
        fsid, keyring, monmap = (
            str(uuid.uuid4()),
            str(folder / "keyring"),
            str(folder / "monmap"),
        )
        Path(self._config).write_text(
            CONFIG.format(fsid=fsid, monitor=MONITOR, port=PORT, folder=folder)
        )
        everything = (
            "--cap",
            "mon",
            "allow *",
            "--cap",
            "osd",
            "allow *",
            "--cap",
            "mgr",
            "allow *",
        )
        self._run(
            "ceph-authtool",
            keyring,
            "--create-keyring",
            "--gen-key",
            "-n",
            "mon.",
            "--cap",
            "mon",
            "allow *",
        )
        for name in ("client.admin", "client.rgw", "mgr.x"):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
        osd_rights = (
            "--cap",
            "mon",
            "allow profile osd",
            "--cap",
            "mgr",
            "allow profile osd",
            "--cap",
            "osd",
            "allow *",
        )
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", *osd_rights)
        self._run(
            "monmaptool",
            "--create",
            "--fsid",
            fsid,
            "--addv",
            "a",
            f"[v2:127.0.0.1:{MONITOR}]",
            monmap,
        )
        self._daemon(
            "ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring
        )
        self._daemon("ceph-mon", "-i", "a")
        self._daemon("ceph-mgr", "-i", "x")
        osd = str(uuid.uuid4())  # it must boot with the number that the monitor knows
        self._daemon("ceph", "-n", "client.admin", "osd", "new", osd, "0")
        self._daemon(
            "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "--monmap", monmap
        )
        self._daemon("ceph-osd", "-i", "0")
        self.start_gateway()
        user = (
            "user",
            "create",
            "--uid=test",
            "--display-name=test",
            f"--access-key={KEY}",
            f"--secret-key={SECRET}",
        )
        self._daemon("radosgw-admin", "-n", "client.rgw", *user)

    def start_gateway(self) -> None:
        self._daemon("radosgw", "-n", "client.rgw")
        await_that(self.answers, "the gateway", 60)

    def kill_gateway(self) -> None:
        self._kill(self._folder / "run" / "client.rgw.pid")
        await_that(lambda: not self.answers(), "the gateway to be gone", 20)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def down(self) -> None:
        for file in (self._folder / "run").glob("*.pid"):
            self._kill(file)

    def _kill(self, file: Path) -> None:
        pid = int(file.read_text())
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        await_that(
            lambda: (
                not Path(f"/proc/{pid}/stat").exists()
                or " Z " in Path(f"/proc/{pid}/stat").read_text()
            ),
            str(pid),
            20,
        )
        file.unlink()

    def _daemon(self, program: str, *arguments: str) -> None:
        self._run(program, "-c", self._config, *arguments)

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
