"""A stub of NebulaGraph's ``graphd``: its wire, its sessions and its error codes, over a graph in memory.

It takes the statements of ``nebula_statements`` and nothing else; that real servers take them too, only those can tell.
"""

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from nebula3.common.ttypes import DataSet, ErrorCode, Row, Value
from nebula3.fbthrift.protocol.THeaderProtocol import THeaderProtocol
from nebula3.fbthrift.Thrift import TException
from nebula3.fbthrift.transport.THeaderTransport import THeaderTransport
from nebula3.fbthrift.transport.TSocket import TSocket
from nebula3.fbthrift.transport.TTransport import TBufferedTransport
from nebula3.graph import GraphService
from nebula3.graph.ttypes import AuthResponse, ExecutionResponse, VerifyClientVersionResp

_STRING = r'"(?:\\[0-7]{3}|[^"\\\n])*"'
_IDS = rf"{_STRING}(?:, {_STRING})*"
_MAKE_SPACE = re.compile(r"CREATE SPACE IF NOT EXISTS (\w+)\(partition_num = \d+, replica_factor = \d+, vid_type = FIXED_STRING\(64\)\)")
_USE = re.compile(r"USE (\w+)")
_MAKE_EDGE = re.compile(r"CREATE EDGE IF NOT EXISTS (\w+)\((.*)\)")
_INSERT = re.compile(r"INSERT EDGE (\w+)\(([\w, ]+)\) VALUES (.*)", re.DOTALL)
_INSERTED = re.compile(rf"({_STRING}) -> ({_STRING}):\(((?:{_STRING}|true|false)(?:, (?:{_STRING}|true|false))*)\)(?:, |$)")
_DELETE = re.compile(r"DELETE EDGE (\w+) (.*)")
_DELETED = re.compile(rf"({_STRING}) -> ({_STRING})(?:, |$)")
_GO = re.compile(rf"GO (2 STEPS )?FROM ({_IDS}) OVER ([\w, ]+?)( REVERSELY)? YIELD ([^|]+?)(?: \| (.*))?")
_YIELDED = re.compile(r"(?:(src|dst)\(edge\)|properties\(edge\)\.(\w+)) AS (\w+)")
_GROUPED = re.compile(r"GROUP BY \$-\.(\w+) YIELD \$-\.\1 AS \1, count\(\*\) AS n")
_ORDERED = re.compile(r"ORDER BY \$-\.about DESC, \$-\.passage ASC \| LIMIT (\d+)")

Edges = dict[tuple[str, str], dict[str, Any]]


class Refused(Exception):
    """A statement that graphd does not take, with its error code."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


@dataclass
class Graphd:
    """Serves on a free port of this machine while the ``with`` block lasts.

    Faults: *refusals* are error codes for the next statements, *break_at* is the number of one that fails, *pause* seconds before
    each, *broken_logins* is how many logins fail, ``expire`` ends all sessions, ``stop`` and ``serve`` are a restart. *spaces* is the
    graph: by space and kind of edge. *said* is every statement that came.
    """

    password: str = "nebula"
    port: int = 0
    pause: float = 0.0
    refusals: list[int] = field(default_factory=list)
    break_at: int | None = None
    broken_logins: int = 0
    spaces: dict[str, dict[str, Edges]] = field(default_factory=dict)
    sessions: dict[int, str | None] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    _last: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: socket.socket | None = None
    _clients: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.serve()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def serve(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def stop(self) -> None:
        assert self._server
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        self.expire()

    def cut(self) -> None:
        """End every connection, as a network may."""
        clients, self._clients = self._clients, []
        for each in clients:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def expire(self) -> None:
        """Know no session any more."""
        with self._lock:
            self.sessions.clear()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        wire = TSocket()
        wire.setHandle(client)
        protocol = THeaderProtocol(THeaderTransport(TBufferedTransport(wire)))
        processor = GraphService.Processor(_Handler(self))
        try:
            while True:
                processor.process(protocol, protocol)
        except (TException, OSError):
            client.close()

    def login(self, password: str) -> int:
        if self.broken_logins:
            self.broken_logins -= 1
            raise RuntimeError("as the test wanted")
        if password != self.password:
            raise Refused(ErrorCode.E_BAD_USERNAME_PASSWORD, "Bad username/password")
        with self._lock:
            self._last += 1
            self.sessions[self._last] = None
        return self._last

    def execute(self, session: int, statement: str) -> tuple[list[str], list[list[Any]]]:
        time.sleep(self.pause)
        with self._lock:
            self.said.append(statement)
            if session not in self.sessions:
                raise Refused(ErrorCode.E_SESSION_INVALID, f"Invalid session id: {session}")
            if len(self.said) - 1 == self.break_at:
                raise Refused(ErrorCode.E_EXECUTION_ERROR, "Storage Error: part leader moved")
            if self.refusals:
                raise Refused(self.refusals.pop(0), "as the test wanted")
            return self._interpret(session, statement)

    def _interpret(self, session: int, statement: str) -> tuple[list[str], list[list[Any]]]:
        if found := _MAKE_SPACE.fullmatch(statement):
            self.spaces.setdefault(found[1], {})
            return [], []
        if found := _USE.fullmatch(statement):
            if found[1] not in self.spaces:
                raise Refused(ErrorCode.E_EXECUTION_ERROR, "SpaceNotFound")
            self.sessions[session] = found[1]
            return [], []
        space = self.sessions[session]
        if space is None:
            raise Refused(ErrorCode.E_SEMANTIC_ERROR, "Space was not chosen.")
        return _in_space(self.spaces[space], statement)


def _in_space(edges: dict[str, Edges], statement: str) -> tuple[list[str], list[list[Any]]]:
    if found := _MAKE_EDGE.fullmatch(statement):
        edges.setdefault(found[1], {})
    elif found := _INSERT.fullmatch(statement):
        names = found[2].split(", ")
        for one, other, values in _all(_INSERTED, found[3]):
            literals = re.findall(rf"{_STRING}|true|false", values)
            edges[found[1]][_text(one), _text(other)] = dict(zip(names, map(_value, literals), strict=True))
    elif found := _DELETE.fullmatch(statement):
        for one, other in _all(_DELETED, found[2]):
            edges[found[1]].pop((_text(one), _text(other)), None)
    elif found := _GO.fullmatch(statement):
        return _go(edges, *found.groups())
    else:
        raise Refused(ErrorCode.E_SYNTAX_ERROR, f"SyntaxError: {statement[:60]!r}")
    return [], []


def _go(edges: dict[str, Edges], *parts: str | None) -> tuple[list[str], list[list[Any]]]:
    two, ids, over, back, yielded, then = (part or "" for part in parts)
    kinds = over.split(", ")
    if missing := [kind for kind in kinds if kind not in edges]:
        raise Refused(ErrorCode.E_SEMANTIC_ERROR, f"EdgeNotFound: {missing[0]}")
    start = set(map(_text, re.findall(_STRING, ids)))
    step = list(_step(edges, kinds, start, bool(back)))
    if two:
        step = [each for (_, other), _ in step for each in _step(edges, kinds, {other}, back=False)]
    columns = _YIELDED.findall(yielded)
    rows = [{name: {"src": one, "dst": other}.get(end, values.get(prop)) for end, prop, name in columns} for (one, other), values in step]
    if found := _GROUPED.fullmatch(then):
        return [found[1], "n"], [list(each) for each in Counter(row[found[1]] for row in rows).items()]
    if found := _ORDERED.fullmatch(then):
        rows = sorted(rows, key=lambda row: (not row["about"], row["passage"].encode()))[: int(found[1])]
    elif then:
        raise Refused(ErrorCode.E_SYNTAX_ERROR, f"SyntaxError: {then[:60]!r}")
    return [name for *_, name in columns], [list(row.values()) for row in rows]


def _step(edges: dict[str, Edges], kinds: list[str], start: set[str], back: bool) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for kind in kinds:
        for (one, other), values in edges[kind].items():
            if (other if back else one) in start:
                yield (one, other), values


def _all(pattern: "re.Pattern[str]", text: str) -> list[tuple[str, ...]]:
    """Every match of *pattern*, which must be all that there is of *text*."""
    found = list(pattern.finditer(text))
    if "".join(each[0] for each in found) != text:
        raise Refused(ErrorCode.E_SYNTAX_ERROR, "SyntaxError in a list")
    return [each.groups() for each in found]


def _text(literal: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), literal[1:-1])


def _value(literal: str) -> str | bool:
    return _text(literal) if literal.startswith('"') else literal == "true"


@dataclass
class _Handler:
    """What the generated processor calls."""

    graphd: Graphd

    def authenticate(self, username: bytes, password: bytes) -> AuthResponse:
        words = password.decode() if isinstance(password, bytes) else password
        try:
            session = self.graphd.login(words)
        except Refused as error:
            return AuthResponse(error_code=error.code, error_msg=str(error).encode())
        return AuthResponse(error_code=ErrorCode.SUCCEEDED, session_id=session, time_zone_offset_seconds=0, time_zone_name=b"UTC")

    def signout(self, session: int) -> None:
        self.graphd.sessions.pop(session, None)

    def verifyClientVersion(self, request: object) -> VerifyClientVersionResp:
        return VerifyClientVersionResp(error_code=ErrorCode.SUCCEEDED)

    def execute(self, session: int, statement: bytes) -> ExecutionResponse:
        return self.executeWithParameter(session, statement, None)

    def executeWithParameter(self, session: int, statement: bytes, parameters: object) -> ExecutionResponse:
        words = statement.decode() if isinstance(statement, bytes) else statement
        try:
            columns, rows = self.graphd.execute(session, words)
        except Refused as error:
            return ExecutionResponse(error_code=error.code, error_msg=str(error).encode(), latency_in_us=1)
        data = DataSet(column_names=[name.encode() for name in columns], rows=[Row(values=[_wire(each) for each in row]) for row in rows])
        return ExecutionResponse(error_code=ErrorCode.SUCCEEDED, latency_in_us=1, data=data)


def _wire(value: Any) -> Value:
    if isinstance(value, bool):
        return Value(bVal=value)
    return Value(iVal=value) if isinstance(value, int) else Value(sVal=value.encode())
