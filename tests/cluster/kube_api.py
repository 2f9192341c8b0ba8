"""A server that does what Kubernetes' API does with a few kinds of objects and with logs, as kubectl asks it to.

What is created is checked field by field (`kube.problems`), as a cluster does that knows the operator's kinds. The
operator itself is not played: a RayJob only lies there, until a test adds what the operator makes of it.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import kube

_VERBS = ["create", "delete", "get", "list", "update"]
_KINDS = {
    "v1": {"configmaps": "ConfigMap", "pods": "Pod", "secrets": "Secret"},
    "batch/v1": {"jobs": "Job"},
    "monitoring.coreos.com/v1": {"podmonitors": "PodMonitor"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "ray.io/v1": {"rayjobs": "RayJob"},
}

_LISTS = {
    name: {"kind": f"{kind}List", "apiVersion": version}
    for version, kinds in _KINDS.items()
    for name, kind in kinds.items()
}


def _describe(version: str) -> list[dict[str, Any]]:
    """Return a version's kinds as discovery names them."""
    return [
        {
            "name": name,
            "singularName": kind.lower(),
            "namespaced": True,
            "kind": kind,
            "verbs": _VERBS,
        }
        for name, kind in _KINDS[version].items()
    ]


def _discovery(operator: bool) -> dict[str, dict[str, Any]]:
    """What kubectl reads before its first request: the kinds, and that the server checks fields itself."""
    versions = [name for name in _KINDS if operator or name != "ray.io/v1"]
    groups = []
    for name in versions[1:]:
        version = {"groupVersion": name, "version": "v1"}
        group = {"versions": [version], "preferredVersion": version}
        groups.append({"name": name.removesuffix("/v1"), **group})
    paths = {name: f"/apis/{name}" if "/" in name else "/api/v1" for name in versions}
    found: dict[str, dict[str, Any]] = {
        "/version": {"major": "1", "minor": "31", "gitVersion": "v1.31.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        "/openapi/v3": {
            "paths": {
                p[1:]: {"serverRelativeURL": f"/openapi/v3{p}"} for p in paths.values()
            }
        },
    }
    for name, path in paths.items():
        found[path] = {
            "kind": "APIResourceList",
            "groupVersion": name,
            "resources": _describe(name),
        }
        found[f"/openapi/v3{path}"] = {
            "openapi": "3.0.0",
            "paths": dict(_routes(name, path)),
        }
    return found


def _routes(version: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the route of each kind of a version; each checks the fields of what is created."""
    for name, kind in _KINDS[version].items():
        about = {
            "group": version.rpartition("/")[0],
            "version": "v1",
            "kind": kind,
        }
        patch = {
            "x-kubernetes-group-version-kind": about,
            "parameters": [{"name": "fieldValidation", "in": "query"}],
        }
        yield f"{path}/namespaces/{{namespace}}/{name}/{{name}}", {"patch": patch}


class Api:
    """The server, and what lies in it by path."""

    def __init__(self, *, operator: bool = True) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        """Logs of pods by path."""
        self.refuse: tuple[int, str, str] | None = None
        """Status, reason and message of every answer about objects."""
        self._discovery = _discovery(operator)
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path in api._discovery:
                    self._answer(200, api._discovery[path])
                elif path in api.objects:
                    self._about_objects(200, api.objects[path])
                elif path in api.logs:
                    self._send(200, "text/plain", api.logs[path].encode())
                elif path.rpartition("/")[2] in _LISTS:
                    items = [
                        found
                        for key, found in api.objects.items()
                        if key.startswith(f"{path}/")
                    ]
                    self._about_objects(
                        200,
                        {
                            **_LISTS[path.rpartition("/")[2]],
                            "items": items,
                        },
                    )
                else:
                    self._answer(
                        404,
                        _status(
                            404,
                            "NotFound",
                            "the server could not find the requested resource",
                        ),
                    )

            def do_PUT(self) -> None:
                path, body = self.path.partition("?")[0], self._body()
                assert path in api.objects
                api.objects[path] = body
                self._about_objects(200, body)

            def do_POST(self) -> None:
                path, _, query = self.path.partition("?")
                body = self._body()
                name = body["metadata"]["name"]
                key = f"{path}/{name}"
                problems = kube.problems(body)
                assert "fieldValidation=Strict" in query, query
                if problems:
                    self._answer(422, _status(422, "Invalid", "; ".join(problems)))
                elif key in api.objects:
                    self._answer(
                        409, _status(409, "AlreadyExists", f'"{name}" already exists')
                    )
                else:
                    body["metadata"] |= {
                        "uid": f"uid-of-{name}",
                        "namespace": path.split("/")[-2],
                    }
                    if api.refuse is None:
                        api.objects[key] = body
                    self._about_objects(201, body)

            def do_DELETE(self) -> None:
                found = api.objects.pop(self.path.partition("?")[0])
                self._about_objects(200, found)

            def _body(self) -> dict[str, Any]:
                return dict(
                    json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )

            def _about_objects(self, status: int, body: dict[str, Any]) -> None:
                if api.refuse is not None:
                    status, body = api.refuse[0], _status(*api.refuse)
                self._answer(status, body)

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                self._send(status, "application/json", json.dumps(body).encode())

            def _send(self, status: int, kind: str, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def names(self, kind: str) -> list[str]:
        """The objects of a kind."""
        return [
            key.rpartition("/")[2]
            for key, found in self.objects.items()
            if found["kind"] == kind
        ]

    def close(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    about = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return {**about, "code": code, "reason": reason, "message": message}
