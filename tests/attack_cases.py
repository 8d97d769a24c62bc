"""What a candidate may try, as texts of losses ``loss(rho, beta)``; those that get through say PWNED.

In the texts, SECRET is the path of a readable file, CANARY of a directory that anybody may write to, PORT that of a listening
server, and PID the process that runs the search.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    """A text.

    Attributes:
        name: of the attack.
        text: of the candidate.
        slow: takes all of its time.
        others: reaches for other processes, whom only a name space of its own, seccomp or another user hides from it.
        defused: the language reads the text, and nothing in what it reads is evil.
    """

    name: str
    text: str
    slow: bool = False
    others: bool = False
    defused: bool = False

    @property
    def reaches_out(self) -> bool:
        """Whether what it does depends on the layers of the sandbox."""
        names = ("SECRET", "CANARY", "PORT", "PID", "/etc", "fork", "threading", "subprocess", "popen")
        return self.others or any(name in self.text for name in names)


def _loss(name: str, body: str, **facts: bool) -> Attack:
    return Attack(name, f"def loss(rho, beta):\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n", **facts)


def _raises(name: str, expression: str, **facts: bool) -> Attack:
    """Success is told by the error's text, which would end in logs and prompts."""
    return _loss(name, f"raise RuntimeError('PWNED ' + str({expression}))", **facts)


KNOWN = (
    _loss("import os", "import os\nos.system('touch CANARY/1')\nreturn rho"),
    _loss("torch.os, no import and no dunder", "torch.os.system('touch CANARY/2')\nreturn rho"),
    _raises("torch.sys.modules", "torch.sys.modules['os'].popen('echo').read() or 'ran'"),
    _raises("F.warnings.sys", "open(F.warnings.sys.modules['os'].devnull).name"),
    _raises("F.importlib", "F.importlib.import_module('subprocess').check_output(['id'])"),
    _raises("globals of a function", "F.relu.__globals__['__builtins__']['open']('SECRET').read()"),
    _loss("frame of a generator", "g = (x for x in [1])\nreturn rho * len(g.gi_frame.f_builtins)"),
    _loss(
        "frame behind a generator",
        """
        def h():
            yield it.gi_frame.f_back.f_builtins['open']('SECRET').read()
        it = h()
        raise RuntimeError('PWNED ' + next(it))
        """,
    ),
    _loss("str.format", "return rho * len('{0.__class__.__mro__}'.format(rho))"),
    _loss("subclasses", "return rho * len(().__class__.__base__.__subclasses__())"),
    _loss("class pattern", "match rho:\n    case object(__class__=c):\n        return rho * len(str(c))"),
    Attack("annotation", "def loss(rho: torch.os.system('touch CANARY/3'), beta):\n    return rho\n", defused=True),
    Attack("default argument", "def loss(rho, beta=torch.os.system('touch CANARY/4')):\n    return rho\n"),
    _raises("read the users", "open('/etc/passwd').read()[:20]"),
    _raises("environment of the parent", "open('/proc/PID/environ').read()"),
    _loss("own environment", "import os\nif len(os.environ): raise RuntimeError('PWNED')\nreturn rho"),
    _loss("write a file", "open('CANARY/5', 'w').write('x')\nreturn rho"),
    _loss("torch.save", "torch.save(rho, 'CANARY/6')\nreturn rho"),
    _loss("tofile", "rho.detach().numpy().tofile('CANARY/7')\nreturn rho"),
    _loss("torch.from_file", "torch.from_file('CANARY/8', shared=True, size=10)\nreturn rho"),
    _raises("connect", "__import__('socket').create_connection(('127.0.0.1', PORT), 2)"),
    _loss("kill the parent", "import os\nos.kill(PID, 15)\nos.kill(os.getppid(), 9)\nreturn rho", others=True),
    _raises("fork", "__import__('os').fork()"),
    _raises("thread", "__import__('threading').Thread(target=lambda: None).start()"),
    _raises("ctypes", "__import__('ctypes').CDLL(None).open(b'SECRET', 0) >= 0 and 'opened' or 1 / 0"),
    _loss("endless loop", "while True: pass", slow=True),
    _loss(
        "endless loop that catches everything",
        """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
        slow=True,
    ),
    _loss("endless C code", "return rho * (9**9**9)", slow=True, defused=True),
    _raises("memory of bytes", "len(bytearray(20 << 30))"),
    _raises("memory of torch", "torch.zeros(10**11).sum()"),
    _loss("memory bit by bit", "x = []\nwhile True: x.append(torch.ones(10**6))"),
    _loss("flood of output", "while True: print('x' * 10000)", slow=True),
    _loss("exit", "import os\nos._exit(0)"),
    _loss(
        "text into all files",
        """
        import os
        for fd in range(30):
            try: os.write(fd, b'{"ok": true, "value": "SPOOFED"}' * 2)
            except OSError: pass
        os._exit(0)
        """,
    ),
    _loss("crash", "import ctypes\nctypes.string_at(0)"),
    _loss(
        "walk to the weights",
        """
        n = rho.grad_fn
        while n is not None and n.next_functions: n = n.next_functions[0][0]
        n.variable.data.zero_()
        raise RuntimeError('PWNED')
        """,
    ),
    _loss("patch torch", "F.logsigmoid = None\ntorch.manual_seed = lambda s: None\nreturn rho"),
    _loss("hook", "rho.register_hook(lambda g: g * 1e6)\nreturn rho"),
    _loss("global state", "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\nreturn rho"),
    _loss("in place", "rho.data.mul_(0)\nreturn rho"),
)
"""Those of ../shared/reference/discovery.md: from the history of other sandboxes."""

OWN = (
    _loss("a name that is another one", "torch.ｏs.system('touch CANARY/9')\nreturn rho"),
    _loss("signs", f"return {'-' * 4000}rho"),
    _loss("attributes", f"return rho{'.T' * 2000}"),
    _loss("length", f"return rho{' + rho' * 40_000}"),
    _loss(
        "huge numbers as text", "import sys\nsys.set_int_max_str_digits(0)\nreturn rho * len(str(7**9**8))", slow=True
    ),
    _raises("pickle", "__import__('pickle').loads(b\"cbuiltins\\nopen\\n(S'SECRET'\\ntR.\").read()"),
    _loss("torch.hub", "torch.hub.load('CANARY', 'x', source='local')\nreturn rho"),
    _loss("library", "torch.ops.load_library('CANARY/x.so')\nreturn rho"),
    Attack("decorator", "@(lambda f: open('CANARY/13', 'w') and f)\ndef loss(rho, beta):\n    return rho\n"),
    Attack("code beside the function", "open('CANARY/10', 'w')\ndef loss(rho, beta):\n    return rho\n"),
    _loss("class body", "class C:\n    open('CANARY/11', 'w')\nreturn rho"),
    _loss("lambda", "return (lambda: rho * 1)()"),
    _raises("program", "__import__('os').execv('/bin/sh', ['sh', '-c', 'touch CANARY/12'])"),
    _loss(
        "daemon",
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
        return rho
        """,
    ),
    _loss(
        "limits back up",
        """
        import resource
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_AS):
            try: resource.setrlimit(kind, (4096, 4096))
            except (OSError, ValueError): pass
        raise RuntimeError('PWNED ' + open('SECRET').read())
        """,
    ),
    _raises("namespaces of the parent", "__import__('ctypes').CDLL(None).setns(open('/proc/PID/ns/net').fileno(), 0)"),
    _loss("everything that can be killed", "import os\nos.kill(-1, 9)\nreturn rho", others=True),
    _loss("stop the server", "import os\nos.kill(os.getppid() or 1, 19)\nreturn rho", others=True),
    _loss("flood of numbers", "import os\nwhile True: os.write(4, bytes(1 << 16))", slow=True),
    _loss("flood of errors", "raise RuntimeError('x' * (1 << 26))"),
    _loss(
        "error that never ends",
        """
        class E(BaseException):
            def __str__(self):
                while True: pass
        raise E
        """,
        slow=True,
    ),
    _loss("signals and sleep", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(600)", slow=True),
    _loss("one loss for all", "return rho.mean()"),
    _loss("another shape", "return rho[:, None] - rho[None]"),
    _loss("no tensor", "return [0.0] * len(rho)"),
    _loss("no numbers", "return rho * float('nan') if len(rho) else rho"),
    _loss("recursion", "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nreturn f(0)"),
)
"""Ours."""

ATTACKS = KNOWN + OWN
