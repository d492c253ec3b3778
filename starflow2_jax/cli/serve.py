"""Serve a STARFlow2 model over HTTP: a page to talk on, and OpenAI's chat completions.

Needs the extra `serve`: pip install 'starflow2-jax[serve]'.
"""

import argparse

from starflow2_jax.cli.arguments import add_model, load_model, positive
from starflow2_jax.errors import UserError

SUMMARY = "serve a model over HTTP"

_EPILOG = """\
examples:
  starflow2 serve --model runs/digits --port 8000     # then open http://127.0.0.1:8000
  curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user",
    "content": "a handwritten three"}], "guidance": 2, "seed": 1}'

Replies hold the text under message.content, images as data: URLs under message.images, and both in
order under message.parts. Images in questions are image_url parts with data: URLs. There is no
authentication: --host 0.0.0.0 lets everybody on the network ask.

exit codes: 0 done; 2 bad input
"""


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 0 to 65535")
    return int(text)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("--host", metavar="NAME", default="127.0.0.1", help="(127.0.0.1)")
    parser.add_argument("--port", metavar="N", type=_port, default=8000, help="(8000)")
    parser.add_argument(
        "--rows", metavar="N", type=positive, default=8, help="requests answered at a time (8)"
    )
    parser.add_argument(
        "--waiting", metavar="N", type=positive, default=64, help="requests answered or queued (64)"
    )
    parser.add_argument(
        "--context",
        metavar="N",
        type=positive,
        default=1024,
        help="positions of a conversation (1024)",
    )
    parser.add_argument(
        "--max-images", metavar="N", type=positive, default=4, help="most images of a reply (4)"
    )
    parser.add_argument(
        "--body-mb", metavar="N", type=positive, default=16, help="largest request, MB (16)"
    )
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted.

    Raises:
        UserError: bad model, or the extra is not installed.
    """
    try:
        import uvicorn

        from starflow2_jax.server import ServerConfig, make_application
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install 'starflow2-jax[serve]'"
        ) from error
    from starflow2_jax.sampling.engine import EngineConfig
    from starflow2_jax.service import Service

    config = EngineConfig(rows=args.rows, context=args.context, images=args.max_images)
    service = Service(load_model(args), config)
    print("compiling", flush=True)
    service.engine.warm_up()
    application = make_application(service, ServerConfig(args.waiting, args.body_mb * 2**20))
    print(f"serving on http://{args.host}:{args.port}", flush=True)
    uvicorn.run(
        application,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
        # Connections, whose bodies lie in memory before they are counted as requests.
        limit_concurrency=4 * args.waiting,
    )
