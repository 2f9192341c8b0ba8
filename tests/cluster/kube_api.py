"""A server that does what Kubernetes' API does with RayJobs and ConfigMaps, as kubectl asks it to.

What is created is checked field by field (`kube.problems`), as a cluster does that knows the operator's kinds. The
operator itself is not played: a RayJob only lies there.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import kube

_VERBS = ["create", "get", "list", "update"]
_KINDS = {
    "v1": {
        "name": "configmaps",
        "singularName": "configmap",
        "namespaced": True,
        "kind": "ConfigMap",
        "verbs": _VERBS,
    },
    "ray.io/v1": {
        "name": "rayjobs",
        "singularName": "rayjob",
        "namespaced": True,
        "kind": "RayJob",
        "verbs": _VERBS,
    },
}


def _discovery(operator: bool) -> dict[str, dict[str, Any]]:
    """What kubectl reads before its first request: the kinds, and that the server checks fields itself."""
    version = {"groupVersion": "ray.io/v1", "version": "v1"}
    group = {"name": "ray.io", "versions": [version], "preferredVersion": version}
    resources = {
        v: {"kind": "APIResourceList", "groupVersion": v, "resources": [kind]}
        for v, kind in _KINDS.items()
    }
    paths = (
        {"v1": "/api/v1", "ray.io/v1": "/apis/ray.io/v1"}
        if operator
        else {"v1": "/api/v1"}
    )
    found: dict[str, dict[str, Any]] = {
        "/version": {"major": "1", "minor": "31", "gitVersion": "v1.31.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [group] * operator,
        },
        "/openapi/v3": {
            "paths": {
                p[1:]: {"serverRelativeURL": f"/openapi/v3{p}"} for p in paths.values()
            }
        },
    }
    for version_name, path in paths.items():
        kind, name = _KINDS[version_name]["kind"], _KINDS[version_name]["name"]
        found[path] = resources[version_name]
        about = {
            "group": version_name.rpartition("/")[0],
            "version": "v1",
            "kind": kind,
        }
        patch = {
            "x-kubernetes-group-version-kind": about,
            "parameters": [{"name": "fieldValidation", "in": "query"}],
        }
        route = f"{path}/namespaces/{{namespace}}/{name}/{{name}}"
        found[f"/openapi/v3{path}"] = {
            "openapi": "3.0.0",
            "paths": {route: {"patch": patch}},
        }
    return found


class Api:
    """The server, and what lies in it by path."""

    def __init__(self, *, operator: bool = True) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
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
                elif path.endswith(("/rayjobs", "/configmaps")):
                    items = [
                        found
                        for key, found in api.objects.items()
                        if key.startswith(f"{path}/")
                    ]
                    self._about_objects(
                        200,
                        {
                            "kind": "RayJobList",
                            "apiVersion": "ray.io/v1",
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

            def _body(self) -> dict[str, Any]:
                return dict(
                    json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )

            def _about_objects(self, status: int, body: dict[str, Any]) -> None:
                if api.refuse is not None:
                    status, body = api.refuse[0], _status(*api.refuse)
                self._answer(status, body)

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
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
