"""``capibara up``: one small process that starts everything, keeps it running and ends it in order.

The command becomes ``python -m capibara_flow.cli.up WISH``, so that what read the command line does not stay in memory.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from capibara_flow.cli import fleets, state
from capibara_flow.cli.children import Child
from capibara_flow.cli.supervisor import Stopped, Supervisor, free_port, is_free, local_get
from capibara_flow.engines import weights
from capibara_flow.errors import CannotStart, CapibaraError
from capibara_flow.runtime.embedded import KEY_VARIABLE, SYNC_VARIABLE, USUAL_SYNC, EmbeddedBroker

MODEL_SECONDS = 300.0
READY_SECONDS = 90.0
STREAMS_SECONDS = 60.0
WORKERS_GRACE_SECONDS = 2.0
# Nobody is given more of the broker than its part needs.
#: Where documents are kept; without it there are none.
KNOWLEDGE_VARIABLE = "CAPIBARA_KNOWLEDGE__FOLDER"
ROLES = {
    "streams": ("provisioner",),
    "workers": ("router", "caller", "retriever", "ingester", "undertaker", "accountant"),
    "edge": ("edge",),
    "engine": (),
}
ROLES["together"] = (*ROLES["workers"], *ROLES["edge"])
MODEST = "SmolLM2-135M: proves the pipeline, not answer quality. Bring a better one with --model FILE.gguf or --engine URL."

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What the person asked for; *engines* are base addresses of OpenAI-compatible servers."""

    host: str = "127.0.0.1"
    port: int = 5001
    engines: tuple[str, ...] = ()
    fleet: Path | None = None
    model: Path | None = None
    local_model: bool = True
    state: Path = state.DEFAULT_STATE
    ready_file: Path | None = None
    log_level: str = "info"
    together: bool = False

    @property
    def serves_model(self) -> bool:
        """Whether a model is to be served here."""
        return self.model is not None or (self.local_model and not self.engines and self.fleet is None)


@dataclass
class Run:
    """One run of ``up``, from the first check to the last child's end."""

    wish: Wish
    console: Console
    supervisor: Supervisor
    port: int = 0
    metrics_port: int = 0
    served: list[fleets.Served] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where the edge answers."""
        host = f"[{self.wish.host}]" if ":" in self.wish.host else self.wish.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Start everything; raises ``CannotStart``, ``Stopped``."""
        self.port = self._chosen_port()
        model = self._model() if self.wish.serves_model else None
        self._require_somebody()
        with self.step("broker") as say:
            broker = self._broker()
            self.supervisor.start_broker(broker)
            say(broker.url)
        engine = self._start_engine(*model) if model else None
        fleet = self._fleet_file()
        self.environment = (
            state.told_on(os.environ)
            | broker.environment()
            | {
                "CAPIBARA_FLEET__FILE": str(fleet.absolute()),
                "CAPIBARA_LOG__LEVEL": self.wish.log_level,
            }
        )
        if importlib.util.find_spec("pymilvus") and not os.environ.get(KNOWLEDGE_VARIABLE):
            self.environment[KNOWLEDGE_VARIABLE] = str((self.wish.state / "knowledge").absolute())
        with self.step("streams") as say:
            self.apply_streams()
            say("applied")
        self.supervisor.on_broker_restart = self.apply_streams
        if engine:
            self._await_engine(engine)
        self._start_turns()

    def _broker(self) -> EmbeddedBroker:
        # Taken out of the environment: no child has any business with the key of the store.
        key = os.environ.pop(KEY_VARIABLE, "")
        return EmbeddedBroker(self.wish.state / "nats", store_key=key, sync=os.environ.get(SYNC_VARIABLE, USUAL_SYNC))

    def apply_streams(self) -> None:
        """Declare the streams, in a process of its own: what it loads is not to stay in this one."""
        self.supervisor.finish(self._child("streams", ["capibara_flow", "streams", "apply"]), STREAMS_SECONDS)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Say]:
        """A line of progress; what is said last stays behind its title."""
        began, last = time.monotonic(), ""
        with self.console.status(f"{title} ...") as status:

            def say(text: str) -> None:
                nonlocal last
                last = escape(text)
                status.update(f"{title} ... {last}")

            yield say
        self.console.print(f"[green]✓[/] {title:<9}{last} [dim]({time.monotonic() - began:.1f} s)[/]", highlight=False, soft_wrap=True)

    def _chosen_port(self) -> int:
        if not self.wish.port:
            return free_port(self.wish.host)
        if not is_free(self.wish.host, self.wish.port):
            raise CannotStart(f"port {self.wish.port} of {self.wish.host} is taken: choose another with --port (0 finds a free one)")
        return self.wish.port

    def _child(self, name: str, module: list[str], environment: dict[str, str] | None = None) -> Child:
        logs = self.wish.state / "logs"
        logs.mkdir(exist_ok=True)
        broker = self.supervisor.broker
        own = self.environment | broker.environment(*ROLES[name]) if broker and ROLES[name] else {}
        return Child(name, [sys.executable, "-m", *module], own | (environment or {}), logs / f"{name}.log")

    # --- who answers ------------------------------------------------------------------------------------------

    def _model(self) -> tuple[Path, str]:
        """The weights to serve here, and their name."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise CannotStart(
                "nothing here can serve a model: `pip install 'capibara-flow[local]'`, name a server with --engine URL, or --no-local-model"
            )
        path = self.wish.model or weights.packaged()
        if not path.is_file():
            raise CannotStart(f"--model {path}: no such file")
        return path, fleets.expert_name(path.name) if self.wish.model else weights.ALIAS

    def _require_somebody(self) -> None:
        if self.wish.fleet:
            self.served += fleets.listed(self.wish.fleet)
        elif not (self.wish.engines or self.wish.serves_model):
            raise CannotStart(
                "nobody to answer: name a server with --engine URL, a fleet with --fleet FILE, or a model with --model FILE.gguf"
            )

    def _start_engine(self, path: Path, alias: str) -> Child:
        # A port of our choice, so that the engine is found at the same address after a crash.
        port = free_port("127.0.0.1")
        self.served += [fleets.local(alias, port)] if self.wish.model else fleets.small_pair(alias, port)
        self._engine_ready.unlink(missing_ok=True)
        arguments = ["--model", str(path), "--alias", alias, "--port", str(port), "--ready-file", str(self._engine_ready)]
        child = self._child("engine", ["capibara_flow.engines.xllamacpp", *arguments])
        self.supervisor.start(child)
        return child

    @property
    def _engine_ready(self) -> Path:
        return self.wish.state / "engine.json"

    def _await_engine(self, engine: Child) -> None:
        with self.step("model") as say:
            say(f"{self.served[0].name} (loading)")
            self.supervisor.until(self._engine_ready.is_file, MODEL_SECONDS, "the model was not ready")
            say(f"{' and '.join(each.name for each in self.served)}, pid {engine.pid}")

    def _fleet_file(self) -> Path:
        if self.wish.fleet:
            return self.wish.fleet
        for index, url in enumerate(self.wish.engines, 1):
            with self.step("engine") as say:
                say(url)
                found = fleets.models_at(url, index, ask=fleets.ask_json, pause=self.supervisor.pause)
                say(f"{url}: {', '.join(each.model or 'lists no models: is it up?' for each in found)}")
            self.served += found
        self.served = fleets.uniquely_named(self.served)
        path = self.wish.state / "fleet.toml"
        policy = fleets.small_policy(weights.ALIAS) if self.wish.serves_model and not self.wish.model else ""
        fleets.write_private(path, fleets.fleet_toml(self.served) + policy)
        return path

    # --- turns ------------------------------------------------------------------------------------------------

    def _start_turns(self) -> None:
        # Who presses Ctrl-C in the middle of an answer does not want to see its end.
        patience = os.environ.get("CAPIBARA_WORKER__GRACEFUL_SECONDS", str(WORKERS_GRACE_SECONDS))
        workers = {"CAPIBARA_WORKER__GRACEFUL_SECONDS": patience}
        edge = {"CAPIBARA_EDGE__HOST": self.wish.host, "CAPIBARA_EDGE__PORT": str(self.port)}
        self.metrics_port = int(os.environ.get("CAPIBARA_WORKER__METRICS_PORT", "0"))
        if self.wish.together:  # the edge tells the metrics of its process, and so all of them
            self._start_door(self._child("together", ["workers", "all", "edge"], workers | edge))
            return
        self.metrics_port = self.metrics_port or free_port("127.0.0.1")
        workers["CAPIBARA_WORKER__METRICS_PORT"] = str(self.metrics_port)
        with self.step("workers") as say:
            child = self._child("workers", ["workers", "all"], workers)
            self.supervisor.start(child)
            say(f"pid {child.pid}")
        self._start_door(self._child("edge", ["capibara_flow", "edge"], edge))

    def _start_door(self, child: Child) -> None:
        """Start the *child* that has the edge, and wait until turns are taken."""
        with self.step(child.name) as say:
            self.supervisor.start(child)
            self.supervisor.until(lambda: self._edge_ready(say), READY_SECONDS, "the edge was not ready")
            say(f"{self.address}, pid {child.pid}")

    def _edge_ready(self, say: Say) -> bool:
        try:
            status, body = local_get(self.wish.host, self.port, "/ready")
            missing = json.loads(body).get("missing", {})
        except (OSError, ValueError, AttributeError):
            return False
        say(", ".join(f"waits for {name}: {why}" for name, why in missing.items()))
        return status == 200

    # --- telling ----------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What runs, for programs."""
        broker = self.supervisor.broker
        pids = {child.name: child.pid for child in self.supervisor.children} | {"broker": broker.pid if broker else None}
        return {
            "url": self.address,
            "pid": os.getpid(),
            "broker": broker.url if broker else None,
            "pids": pids,
            "models": [each.name for each in self.served],
            "metrics": [f"{self.address}/metrics"] + [f"http://127.0.0.1:{self.metrics_port}/metrics"] * bool(self.metrics_port),
        }

    def remember(self) -> None:
        """Write the ready file, and what other commands of this user need to reach the broker."""
        fleets.write_private(self.wish.state / state.FILE, json.dumps(self.facts() | {"environment": self.environment}, indent=1))
        if self.wish.ready_file:
            fleets.write_private(self.wish.ready_file, json.dumps(self.facts(), indent=1))

    def forget(self) -> None:
        """Remove what told others that we run."""
        for path in (self.wish.state / state.FILE, self.wish.ready_file):
            if path:
                path.unlink(missing_ok=True)

    def tell(self) -> None:
        """Say how to use it."""
        facts = self.facts()
        running = ", ".join(f"{name} {pid}" for name, pid in facts["pids"].items())
        question = json.dumps({"messages": [{"role": "user", "content": "Why is the sky blue?"}]})
        lines = [
            "",
            f"  page    {self.address}/",
            f"  chat    capibara chat --url {self.address}",
            f"  curl    curl -N {self.address}/api/chat -H 'Content-Type: application/json' -d '{question}'",
            f"  models  {', '.join(facts['models'])}",
            f"  metrics {', '.join(facts['metrics'])}",
            f"  pids    {running}; logs in {self.wish.state / 'logs'}",
        ]
        if any(each.name == weights.ALIAS for each in self.served):
            lines.append(f"  note    {MODEST}")
        for line in [*lines, "", "Ctrl-C stops everything."]:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def become(wish: Wish) -> NoReturn:
    """Turn this process into the supervisor of *wish*; raises ``SettingsError``, rather than let each child say so in its log."""
    from capibara_flow import settings  # noqa: PLC0415  what it loads ends with this program

    nats = settings.load().nats
    os.environ |= {SYNC_VARIABLE: nats.sync} | ({KEY_VARIABLE: nats.store_key.get_secret_value()} if nats.store_key else {})
    words = json.dumps(asdict(wish), default=str)
    os.execv(sys.executable, [sys.executable, "-m", "capibara_flow.cli.up", words])  # noqa: S606  no shell is wanted


def understood(words: str) -> Wish:
    """The wish that ``become`` wrote."""
    wish = json.loads(words)
    paths = {name: Path(wish[name]) for name in ("fleet", "model", "state", "ready_file") if wish[name] is not None}
    return Wish(**(wish | paths | {"engines": tuple(wish["engines"])}))


def main(words: str) -> int:
    """Run the supervisor; returns the exit code."""
    try:
        up(understood(words), Console())
    except CapibaraError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    return 0


def up(wish: Wish, console: Console) -> None:
    """Start, tell, watch, and end everything in order when asked to; raises ``CannotStart``."""

    def report(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    try:
        wish.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if wish.ready_file:
            wish.ready_file.unlink(missing_ok=True)
    except OSError as error:
        raise CannotStart(f"{error.filename}: {error.strerror}: choose another place with --state or --ready-file") from error
    try:
        with Supervisor(report) as supervisor:
            run = Run(wish, console, supervisor)
            run.start()
            try:
                run.remember()
                supervisor.on_restart = run.remember
                run.tell()
                supervisor.watch()
            finally:
                run.forget()
    except Stopped:
        report("stopped")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
