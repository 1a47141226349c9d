"""The command line: minidiff train | sample | evaluate | download | export | doctor."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from minidiff import __version__
from minidiff.errors import UserError, UserNotice

DEMO_RUN = "runs/demo"
TOGETHER = 4  # pictures of a pretrained model that are drawn in one batch: the memory they take grows with it


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of the user's are one sentence on stderr and status 1."""
    warnings.filterwarnings("ignore", "Image size .* decompression bomb", module="PIL")  # our own sentence says it
    try:
        args, unknown = _parser().parse_known_args(arguments)
        if unknown:
            raise UserError(_unknown_flag(unknown[0], args.parser))
        with _notices_said():
            return args.command(args)
    except UserError as e:
        print(f"minidiff: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minidiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `minidiff train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as e:
        print(f"minidiff: there is not enough memory for that ({e}); draw fewer or smaller pictures", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"minidiff: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _notices_said() -> Iterator[None]:
    """Print notices to the user as one sentence each, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserNotice)
        others, said = warnings.showwarning, set()

        def say(message: Any, category: Any, *where: Any, **rest: Any) -> None:
            if issubclass(category, UserNotice):
                if str(message) not in said:
                    print(f"minidiff: {message}", file=sys.stderr)
                said.add(str(message))
            else:
                others(message, category, *where, **rest)

        warnings.showwarning = say  # type: ignore[assignment]
        yield


class _Parser(argparse.ArgumentParser):
    """Argparse, with its errors as one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _unknown_flag(flag: str, parser: argparse.ArgumentParser) -> str:
    from minidiff.config import did_you_mean

    known = list(parser._option_string_actions)
    return f"there is no option {flag}{did_you_mean(flag.partition('=')[0], known)}; see {parser.prog} --help"


def _parser() -> argparse.ArgumentParser:
    from minidiff.config import SECTIONS, presets

    parser = _Parser(
        prog="minidiff",
        description="Text-to-image diffusion, written out from scratch.",
        epilog="minidiff COMMAND --help tells more. Start with: minidiff train shapes --out runs/first",
    )
    parser.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    p = commands.add_parser(
        "train",
        usage="minidiff train PRESET [--out FOLDER] [--SECTION.SETTING VALUE ...]\n"
        "       minidiff train --resume FOLDER [--train.SETTING VALUE ...]",
        allow_abbrev=False,
        help="train a model from a preset, or go on with a run",
        description="Train a model. Writes a run folder: config.toml, log.jsonl, samples/, checkpoint.safetensors. "
        "Ctrl-C saves and says how to go on.",
        epilog=f"Examples: minidiff train shapes --out runs/a --train.minutes 20 --unet.channels 64,128"
        f"  |  minidiff train --resume runs/a. Presets: {', '.join(presets())}.",
    )
    p.add_argument("preset", nargs="?", help="a preset's name or a TOML file")
    p.add_argument(
        "--out", metavar="FOLDER", help="the run's folder, which must not hold a run yet (default: runs/PRESET)"
    )
    p.add_argument(
        "--resume",
        metavar="FOLDER",
        help="go on with this run; settings of `train` and `sample`, and --data, replace its own",
    )
    p.add_argument(
        "--data", dest="data.path", metavar="PATH", default=argparse.SUPPRESS,
        help="the pictures to train on: CIFAR-10, COCO, or a folder of your own, as the preset expects them",
    )  # fmt: skip
    _add_settings(p, SECTIONS, "if no preset sets it")
    p.set_defaults(command=_train)

    p = commands.add_parser(
        "sample",
        usage="minidiff sample PROMPT [PROMPT ...] [--run FOLDER | --pretrained FOLDER] [--count N] [--seed N] "
        "[--out PATH] [--sample.SETTING VALUE ...]",
        allow_abbrev=False,
        help="draw pictures of captions",
        description="Draw one picture or several of each caption with a trained model. The prompt, the seed and all "
        "settings are written into the PNG.",
        epilog='Example: minidiff sample "a red circle above a blue square" --count 4 --sample.guidance 2',
    )
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to draw; "" is the unconditional input')
    p.add_argument(
        "--run", metavar="FOLDER", help=f"the run whose model draws (default: {DEMO_RUN}, else the model in the box)"
    )
    p.add_argument(
        "--pretrained", metavar="FOLDER",
        help="draw with a model in diffusers' layout instead, such as Stable Diffusion 1 or 2; by its own sampler, "
        "in 20 steps with guidance 7.5, unless it or settings say otherwise; several pictures go into a folder",
    )  # fmt: skip
    p.add_argument("--negative", metavar="PROMPT", help="--pretrained: what the pictures shall not show")
    p.add_argument("--size", metavar="HxW", help="--pretrained: pixels, 512 or 512x768 (default: as it was trained)")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged or raw weights (default: ema)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)")
    p.add_argument("--count", type=int, default=1, metavar="N", help="pictures of each caption (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="the same seed draws the same pictures (default: 0)")
    p.add_argument(
        "--out", metavar="PATH",
        help="a .png file for one labelled grid, or a new folder for separate pictures (default: sample-NNN.png)",
    )  # fmt: skip
    _add_settings(p, {"sample": SECTIONS["sample"]}, "unless the run says otherwise")
    p.set_defaults(command=_sample)

    p = commands.add_parser(
        "evaluate",
        usage="minidiff evaluate [FOLDER] [--n N] [--seed N] [--split test|val] [--sample.SETTING VALUE ...]",
        allow_abbrev=False,
        help="score a run",
        description="Of shapes: draw held-out two-object captions, read the pictures with the exact checker, and print "
        "how many are right in colours, shapes, sizes, relation and in everything. Of pictures with classes: draw "
        "every class, and print how many a small classifier, trained on the real pictures, names as asked. Writes the "
        "pictures into the run's folder.",
    )
    p.add_argument("run", nargs="?", default=DEMO_RUN, metavar="FOLDER", help="the run (default: %(default)s)")
    p.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged or raw weights (default: ema)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)")
    p.add_argument("--n", type=int, default=500, help="number of captions (default: 500)")
    p.add_argument("--seed", type=int, default=0, help="chooses captions and noise (default: 0)")
    p.add_argument(
        "--split",
        choices=["test", "val"],
        default="test",
        help="of shapes: val has the captions to choose settings on (default: test)",
    )
    p.add_argument(
        "--data", dest="data.path", metavar="FOLDER", default=argparse.SUPPRESS,
        help="where the pictures of the run's classes are now (default: where they were in training)",
    )  # fmt: skip
    p.add_argument(
        "--data.cache", metavar="FOLDER", default=argparse.SUPPRESS,
        help="folder for decoded pictures and the classifier (default: that of the run)",
    )  # fmt: skip
    p.add_argument("--no-pictures", action="store_true", help="print the scores, write nothing")
    _add_settings(p, {"sample": SECTIONS["sample"]}, "unless the run says otherwise")
    p.set_defaults(command=_evaluate)

    p = commands.add_parser(
        "download",
        help="fetch a dataset, or go on with a broken download",
        description="Fetch a dataset's archive from its authors, check its published checksum, and leave it unpacked: "
        "the loaders read the archive. The same command goes on with a download that was broken off. The authors' "
        "server is slow: an hour is not unusual. An archive that you have from elsewhere needs no download: put it, or "
        "the unpacked folder, into --out.",
    )
    p.add_argument("name", choices=["cifar10"], help="the dataset")
    p.add_argument("--out", default="data", metavar="FOLDER", help="where to put it (default: %(default)s)")
    p.add_argument(
        "--form",
        choices=["python", "binary"],
        default="binary",
        help="which of the published archives (default: binary)",
    )
    p.add_argument("--mirror", metavar="URL", help="fetch it from here instead of from its authors' site")
    p.set_defaults(command=_download)

    p = commands.add_parser(
        "export",
        help="write a run's averaged weights as one small file, or as diffusers has them",
        description="Write the averaged weights of a run as float16, without what only training needs: minidiff sample "
        "--run FILE draws with them. Or write a folder in the layout of diffusers, float32, whose parts diffusers and "
        "transformers load.",
    )
    p.add_argument("run", nargs="?", default=DEMO_RUN, metavar="FOLDER", help="the run (default: %(default)s)")
    p.add_argument("--out", required=True, metavar="PATH", help="a .safetensors file, or a new folder")
    _add_settings(p, {"sample": SECTIONS["sample"]}, "unless the run says otherwise")
    p.set_defaults(command=_export)

    p = commands.add_parser("doctor", help="show what is installed and what is missing")
    p.set_defaults(command=_doctor)
    for p in commands.choices.values():
        p.set_defaults(parser=p)
    return parser


def _add_settings(parser: argparse.ArgumentParser, sections: dict[str, type], default_holds: str) -> None:
    """One flag --section.field for every setting; the values are checked by config.py."""
    from minidiff.config import DECIDED

    for section, kind in sections.items():
        group = parser.add_argument_group(f"{section} settings", kind.__doc__)
        hints = get_type_hints(kind)
        for f in fields(kind):
            if f.name in DECIDED.get(section, ()):
                continue
            value = f.default if f.default is not MISSING else None
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            name = getattr(hints[f.name], "__name__", "value")
            shown = "none" if shown == "" else shown
            group.add_argument(
                f"--{section}.{f.name}",
                metavar={"int": "N", "float": "X", "bool": "BOOL", "tuple": "A,B,..."}.get(name, "NAME"),
                help=f"{f.metadata['help']} ({shown} {default_holds})".replace("%", "%%"),
                default=argparse.SUPPRESS,
            )


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    return {name: value for name, value in vars(args).items() if "." in name}


def _train(args: argparse.Namespace) -> int:
    from minidiff.evaluate import draw_training_grid
    from minidiff.train import fit

    state, data, folder = _resumed(args) if args.resume else _begun(args)
    c = state.config.train
    if state.step >= c.steps and not c.minutes:
        print(f"{folder} is at step {state.step} of {c.steps} already; to go on: --train.steps {2 * c.steps}")
        return 0
    _tell(data)
    done = fit(state, folder, draw_training_grid, data)
    if done:
        print(f"trained {state.step} steps in {state.seconds / 60:.1f} minutes: {folder}")
        return 0
    print(f"stopped after step {state.step}, saved; to go on: minidiff train --resume {folder}", file=sys.stderr)
    return 130


def _tell(data: Any) -> None:
    """Say on stderr what was found, where pictures were looked for."""
    from minidiff.data.pictures import Pictures

    if isinstance(data, Pictures):
        print(f"data: {data.summary()}", file=sys.stderr)


def _begun(args: argparse.Namespace) -> tuple[Any, Any, Path]:
    from minidiff.config import load_config
    from minidiff.train import data_of, new_state

    if not args.preset:
        from minidiff.config import presets

        raise UserError(f"name a preset ({', '.join(presets())}) or a TOML file, or a run to --resume")
    config = load_config(args.preset, _overrides(args))
    folder = Path(args.out or f"runs/{Path(args.preset).stem}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not empty; go on with it (--resume {folder}) or choose another folder (--out)"
        )
    pictures, place = Path(os.path.expanduser(config.data.path)).resolve(), folder.resolve()
    if config.data.name == "folder" and config.data.path and pictures in (place, *place.parents):
        raise UserError(
            f"{folder} lies in {config.data.path}: what the run draws would be among its training pictures; "
            "name a folder outside (--out)"
        )
    data = data_of(config)
    state = new_state(config, data)
    folder.mkdir(parents=True, exist_ok=True)
    return state, data, folder


def _resumed(args: argparse.Namespace) -> tuple[Any, Any, Path]:
    from minidiff.checkpoint import FILE
    from minidiff.train import data_of, load_state

    if args.preset or args.out:
        raise UserError("--resume goes on with a run as it is: name neither a preset nor --out beside it")
    folder = Path(args.resume)
    state = load_state(folder / FILE, _overrides(args))
    path = Path(state.config.data.path)
    if state.config.data.path and not path.exists():
        raise UserError(f"the pictures of this run are no longer in {path}; say with --data where they are now")
    return state, data_of(state.config), folder


def _sample(args: argparse.Namespace) -> int:
    from minidiff.sample import draw, save_pictures
    from minidiff.train import default_run, load_model

    if args.count < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--count must be at least 1 and --seed in 0..2^64 - 1")
    if args.pretrained is not None:
        return _sample_pretrained(args)
    if args.negative is not None or args.size is not None:
        raise UserError("--negative and --size are for --pretrained models")
    model, config = load_model(args.run, _weights(args), args.device)
    settings = _sample_settings(config, args)
    for prompt in args.prompts:
        unknown = model.tokenizer.unknown(prompt)
        if unknown:
            raise UserError(_unknown_words(unknown, model.tokenizer.words))
    out = _free_path(args.out)
    captions = [prompt for prompt in args.prompts for _ in range(args.count)]
    images = draw(model, captions, settings, args.seed)
    about = {"seed": args.seed, "run": args.run or default_run(), "weights": args.weights}
    save_pictures(images, captions, out, {**vars(settings), **about})
    print(out)
    return 0


def _sample_pretrained(args: argparse.Namespace) -> int:
    import numpy as np

    from minidiff.config import Config, SampleConfig, with_overrides
    from minidiff.pretrained import load_pipeline, read_scheduler
    from minidiff.sample import guidance, save_picture, save_pictures

    if args.run:
        raise UserError("--run and --pretrained both name a model; give one")
    if args.weights != "ema":
        raise UserError("--weights is for runs of our own; a pretrained folder has one set of weights")
    given = _overrides(args)
    foreign = sorted(given.keys() & {"sample.clip", "sample.sigma"})
    if foreign:
        raise UserError(f"--{foreign[0]}: a pretrained model's own scheduler_config.json decides it")
    settings = with_overrides(Config(sample=SampleConfig()), given, "the command line").sample
    size, captions = _size(args.size), [prompt for prompt in args.prompts for _ in range(args.count)]
    out = _free_path(args.out, ".png" if len(captions) == 1 else "")
    pipe = load_pipeline(args.pretrained, args.device)
    own = {name: getattr(pipe, name) for name in ("steps", "guidance") if f"sample.{name}" not in given}
    sampler = settings.sampler if "sample.sampler" in given else None
    sampling = read_scheduler(pipe.scheduler, sampler)
    settings = replace(settings, sampler=sampling.sampler, **own)
    w, negative = guidance(settings, sampling.schedule.T), args.negative or ""
    rest = (settings.steps, w, negative, args.seed, sampler, size)
    walks = [  # what does not fit is refused here, before anything is drawn
        pipe.denoise(captions[i : i + TOGETHER], *rest, eta=settings.eta, first=i)
        for i in range(0, len(captions), TOGETHER)
    ]
    images = np.concatenate([pipe.draw(walk) for walk in walks])
    names = ("sampler", "steps", "guidance", "eta", "rescale", "interval")
    facts = {name: getattr(settings, name) for name in names}
    facts |= {name: getattr(sampling, name) for name in ("prediction", "spacing", "karras", "clip")}
    facts |= {"seed": args.seed, "model": args.pretrained, "negative": negative, **sampling.options}
    if len(captions) == 1 and out.suffix:
        save_picture(images[0], out, {"prompt": captions[0], **facts})
    else:
        save_pictures(images, captions, out, facts)
    print(out)
    return 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--size must be pixels, like 512 or 512x768 (height x width), got {text!r}")
    return int(sides[0]), int(sides[-1])


def _unknown_words(unknown: list[str], words: tuple[str, ...]) -> str:
    from minidiff.config import did_you_mean

    few = len(words) <= 40
    known = f"its words: {', '.join(words)}" if few else f"it knows the {len(words)} words of its training captions"
    guess = "" if few else did_you_mean(unknown[0], list(words))
    return f"this model does not know {', '.join(map(repr, unknown))}{guess}; {known}"


def _free_path(given: str | None, suffix: str = ".png") -> Path:
    """The path to write to, which must not exist; without one, the first free sample-NNN with the suffix."""
    if given is None:
        return next(p for i in range(1, 10**6) if not (p := Path(f"sample-{i:03d}{suffix}")).exists())
    path = Path(given)
    if path.exists():
        raise UserError(f"{path} exists; remove it or choose another --out")
    if path.suffix not in ("", ".png"):
        raise UserError(f"--out takes a .png file or a folder, got {path}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {path}: nothing can be written into {above}")
    return path


def _evaluate(args: argparse.Namespace) -> int:
    from minidiff.classifier import classifier_of, pictures_with_classes
    from minidiff.config import with_overrides
    from minidiff.evaluate import evaluate, evaluate_classes, summary, write_report
    from minidiff.train import load_model

    if args.n < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--n must be at least 1 and --seed in 0..2^64 - 1")
    model, config = load_model(args.run, _weights(args), args.device)
    config = with_overrides(config, _overrides(args), "the command line")
    settings = config.sample
    if config.data.name == "shapes":
        result = evaluate(model, settings, args.n, args.seed, args.split)
    else:
        data = pictures_with_classes(config.data, config.text.context - 2)
        foreign = [prompt for prompt in data.prompts if model.tokenizer.unknown(prompt)]
        if foreign and config.data.limit:
            raise UserError(f"this model does not know {foreign[0]!r}: its --data.limit left that class out")
        if foreign:
            raise UserError(
                f"this model does not know {foreign[0]!r}, a class in {config.data.path}; name, with --data, the "
                "pictures that it was trained on"
            )
        _tell(data)
        result = evaluate_classes(model, settings, *classifier_of(data, config.data), data, args.n, args.seed)
    if not args.no_pictures:
        about = {"split": args.split, "seed": args.seed, "weights": args.weights, "sample": vars(settings)}
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        for path in write_report(model, settings, result, folder, about, args.seed):
            print(path)
    print(summary(result))
    return 0


def _weights(args: argparse.Namespace) -> str:
    return {"ema": "ema", "raw": "model"}[args.weights]


def _sample_settings(config: Any, args: argparse.Namespace) -> Any:
    """The run's own sample settings, with those given on the command line."""
    from minidiff.config import with_overrides

    return with_overrides(config, _overrides(args), "the command line").sample


def _download(args: argparse.Namespace) -> int:
    from minidiff.download import download

    path = download(args.name, Path(args.out), args.form, args.mirror)
    print(f"{path}; to train on it: minidiff train {args.name} --data {shlex.quote(args.out)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from minidiff.train import export_model

    out = Path(args.out)
    if out.suffix == ".safetensors":
        print(export_model(args.run, out, _overrides(args)))
        return 0
    if out.suffix:
        raise UserError(f"--out must be a .safetensors file or a folder without a suffix, got {args.out!r}")
    from minidiff.pretrained import export_folder
    from minidiff.train import load_model

    kept = {"sample.steps", "sample.guidance", "sample.clip"}
    other = sorted(_overrides(args).keys() - kept)
    if other:
        told = ", ".join(f"--{name}" for name in sorted(kept))
        raise UserError(f"--{other[0]} is not kept in a folder, only {told}")
    model, config = load_model(args.run)
    export_folder(model, out, _sample_settings(config, args))
    print(out)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from minidiff.doctor import report

    print(report())
    return 0
