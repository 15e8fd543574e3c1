"""The sections of README.md and docs/: each is text made of one file of results. gpu_section.py has that of the GPUs."""

from typing import Any

NAMES = {
    "dmd": "DMD", "dmd2": "DMD2", "sim": "SIM", "sid": "SiD", "sida": "SiDA", "gdd": "GDD", "gdd_i": "GDD-I", "moment_matching": "moment matching", "sfd": "SFD",
    "msd": "MSD: several students by DMD, each for its classes",
}  # fmt: skip


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *body])


def demo(run: dict[str, Any]) -> str:
    title, n = run["student"]["features"], run["student"]["n"]
    rows = [
        ["", "evaluations per image", f"{title}, n = {n:,}"],
        ["real images against themselves (floor)", "", short(run["floor"]["fd"])],
        [f"teacher, {run['parameters'] / 1e6:.2f} M parameters, {run['seconds']['teacher']:.0f} s of training", str(run["teacher"]["nfe"]), short(run["teacher"]["fd"])],
        [f"student by {NAMES[run['method']]}, {run['seconds']['student']:.0f} s of distillation", f"**{run['student']['nfe']}**", short(run["student"]["fd"])],
    ]  # fmt: skip
    about = f"{run['device']}, {run['precision']} U-Nets, torch {run['versions']['torch']}"
    return f"After the installation `make demo` took {run['seconds']['this_call']:.0f} s ({about}):\n\n{table(rows)}"


def compare(run: dict[str, Any]) -> str:
    """One row a method."""
    titles, more = list(run["floor"]["scores"]), [("images/s", "images_per_second", ",.0f"), ("peak GiB", "peak_memory_gib", ".2f")]
    heads = [*(f"{title}, n = {run['n']:,}" for title in titles), "seconds of training", "images", *(head for head, _, _ in more)]
    rows = [["method", "evaluations", *heads]]
    for name, one in [("floor", run["floor"]), ("teacher", run["teacher"]), *run["methods"].items()]:
        scores = [one["scores"][title] for title in titles]
        rows.append([
            NAMES[name] if name in NAMES else name, str(one.get("nfe", "")), *(short(s) for s in scores), cell(one.get("seconds"), ".0f") if "images" in one else "",
            cell(one.get("images"), ",.0f"), *(cell(one.get(key), form) for _, key, form in more),
        ])  # fmt: skip
    about = f"{run['device']}, {run['precision']} U-Nets, torch {run['versions']['torch']}; {run['data']}.\n\n"
    return about + table(rows)


def night(run: dict[str, Any]) -> str:
    """What the picture at the top of the README shows, the nearest student beside its teacher, and the nearest of one step."""
    title, teacher = next(iter(run["floor"]["scores"])), run["teacher"]
    order = sorted(run["methods"], key=lambda name: run["methods"][name]["scores"][title])
    one_step = next(name for name in order if run["methods"][name]["nfe"] == 1)
    students = "; ".join(
        f"{NAMES.get(name, name)}, {one['nfe']} evaluation{'s' * (one['nfe'] > 1)}, {one['seconds'] / 60:.0f} minutes: {short(one['scores'][title])}"
        for name, one in ((name, run["methods"][name]) for name in dict.fromkeys([order[0], one_step]))
    )
    return (
        f"A JPEG copy of CIFAR-10, from nothing on one thread of a CPU: a teacher of {teacher['parameters'] / 1e6:.1f} M parameters, and its "
        f"student by {NAMES.get(order[0], order[0])}.\n{title} at n = {run['n']:,}, which is no FID: real images {short(run['floor']['scores'][title])}; teacher, "
        f"{teacher['nfe']} evaluations, {teacher['seconds'] / 60:.0f} minutes of training: {short(teacher['scores'][title])}; {students}.\n"
    )


def time_to_quality(run: dict[str, Any]) -> str:
    """Seconds, or where the bar was not reached in its time, plainly that."""
    methods = list(dict.fromkeys(row["method"] for row in run["rows"]))
    rows = [["switch", *(NAMES.get(m, m) for m in methods)]]
    for switch in dict.fromkeys(row["switch"] for row in run["rows"]):
        found = {row["method"]: row for row in run["rows"] if row["switch"] == switch}
        rows.append([switch, *(reached(found[m]) if m in found else "" for m in methods)])
    bar = f"{run['title']} {short(run['bar'])} ({run['factor']:g} times the teacher's {short(run['teacher'])}; floor {short(run['floor'])}; n = {run['n']:,})"
    return f"Seconds of training from the teacher to {bar}, {run['device']}:\n\n{table(rows)}"


def reached(row: dict[str, Any]) -> str:
    if row.get("unavailable"):
        return "not in this version"
    if row["seconds"] is not None:
        return f"{row['seconds']:.0f}"
    return f"not reached ({short(row['best'])} after {row['trained']:.0f} s)"


def scaling(run: dict[str, Any]) -> str:
    rows = [["projected hours", *(f"{n} GPU{'s' * (n > 1)}" for n in run["gpus"])]]
    rows += [[job["name"], *(short(h) for h in job["hours"])] for job in run["projections"]]
    return f"Projections, not measurements, from {run['device']} ({run['measured_by']}):\n\n{table(rows)}"


def skipping(run: dict[str, Any]) -> str:
    """What a lighter teacher costs and saves, by budget and by cache, and what becomes of its samples and students."""
    fd, walk = run.get("sampling", {}), run["trajectory"]
    rows = [
        [
            "teacher",
            "excess denoising loss, worst noise level",
            "one evaluation faster, at DMD's and SIM's levels",
            "SFD's walk faster",
            "FD-pixels of its samples",
        ]
    ]
    rows.append(["full", "", "1", "1", cell(fd.get("full"), ".2f")])
    for budget, plan in run["budgets"].items():
        worst, speed, name = max(b["excess"] for b in plan["bins"]), run["teacher"][budget], f"plan {budget}"
        along = walk.get(name, {}).get("speed_up")
        rows.append(
            [
                f"plan, budget {budget}",
                f"{worst:.4f}",
                f"{speed['dmd']:.2f}, {speed['sim']:.2f}",
                cell(along, ".2f"),
                cell(fd.get(name), ".2f"),
            ]
        )
    rows += [[name, "", "", f"{walk[name]['speed_up']:.2f}", cell(fd.get(name), ".2f")] for name in walk if name.startswith("cache")]
    rows = rows if fd else [row[:-1] for row in rows]
    text = f"A teacher of {run['parameters']:,} parameters ({cpu_of(run)}; medians of interleaved runs):\n\n{table(rows)}"
    if "distillation" not in run:
        return text
    students = run["distillation"]["runs"]
    ratios = ", ".join(f"{one['fd_ratio']:.2f}" for one in students)
    cosine = min(c for one in students for c in one["cosine"])
    return text + (
        "\nDMD's students with the plan of the smallest budget against students without, by seed: "
        f"FD ratio {ratios}; least cosine of their gradients {cosine:.3f}.\n"
    )


def ladder(run: dict[str, Any]) -> str:
    """How many times as fast as the published style each rung is, whole steps of every method and the nets alone."""
    cases = list(dict.fromkeys(row["case"] for row in run["rows"]))
    rungs = [r for r in dict.fromkeys(row["rung"] for row in run["rows"]) if not r.startswith("all but")]
    found = {(row["case"], row["rung"]): row for row in run["rows"]}
    rows = [["", *rungs, "MB kept for backward, first and last"]]
    for case in cases:
        first, last = found[case, rungs[0]], found[case, rungs[-1]]
        kept = f"{first['kept MB']:.0f}, {last['kept MB']:.0f}" if first.get("kept MB") else ""
        rows.append([case, *(f"{found[case, rung]['of published']:.2f}" for rung in rungs), kept])
    return f"Times as fast as the published style ({cpu_of(run)}):\n\n{table(rows)}"


def quality(run: dict[str, Any]) -> str:
    """The published style against what is shipped, by seed: Fréchet distance and seconds."""
    rows = [["", *(f"seed {one['seed']}" for one in run["runs"]), "mean"]]
    for key, title, form in (("fd", "FD-pixels", ".2f"), ("seconds", "seconds", ".0f")):
        for style in ("published", "shipped"):
            each = [format(one[style][key], form) for one in run["runs"]]
            rows.append([f"{style}, {title}", *each, format(run[key][style]["mean"], form)])
    return f"The digits' student in both styles, {run['kimg']:g} thousand images each ({cpu_of(run)}):\n\n{table(rows)}"


def soak(now: dict[str, Any], before: dict[str, Any]) -> str:
    """A row for every kind of fault."""
    verdicts = ["identical", "refused, then identical", "identical but for lost lines", "FAIL"]
    rows = [["fault", *verdicts[:-1], "wrong", "wrong before"]]
    for kind, counts in now["counts"].items():
        failed = str(before["counts"][kind].get("FAIL", 0)) if kind in before["counts"] else ""
        rows.append([kind, *(str(counts.get(verdict, "")) for verdict in verdicts[:-1]), str(counts.get("FAIL", 0)), failed])
    rows.append(["**all**", *(f"**{now['all'].get(verdict, 0)}**" for verdict in verdicts), f"**{before['all']['FAIL']}**"])
    return f"{now['faults']} faults (torch {now['versions']['torch']}); before they were mended {before['faults']} of them were tried:\n\n{table(rows)}"


def endurance(run: dict[str, Any]) -> str:
    """The slope of everything that could grow."""
    return run["sentence"] + "\n"


def fuzz(now: dict[str, Any], before: dict[str, Any]) -> str:
    """A row for every reader."""
    earlier = {row["reader"]: row for row in before["readers"]}
    rows = [["reader", "inputs", "read", "refused", "wrong", "failed", "wrong before", "failed before"]]
    for row in [*now["readers"], {"reader": "**all**"} | now["all"]]:
        old = before["all"] if row["reader"] == "**all**" else earlier.get(row["reader"])
        rows.append([
            row["reader"], *(f"{row.get(key, 0):,}" for key in ("inputs", "read", "refused", "wrong", "failed")),
            *(("" if old is None else f"{old.get(key, 0):,}") for key in ("wrong", "failed")),
        ])  # fmt: skip
    return table(rows)


ROWS: dict[str, str] = {
    "dmd": "DMD", "dmd2": "DMD2, a GAN head", "four steps": "DMD, four steps", "four steps, dmd2": "DMD2, a GAN head, four steps",
    "sim": "SIM", "gdd": "GDD", "sfd": "SFD", "moment matching": "moment matching, four steps",
    "msd, 2 students": "MSD, two students by k-means", "msd, 4 students": "MSD, four students by quadrants",
    "half the blocks": "DMD, half of the blocks (TSM)", "sfd, guided": "SFD, teacher's guidance 2", "dmd, guided": "DMD, teacher's guidance 2",
}  # fmt: skip


def captions(run: dict[str, Any]) -> str:
    """Teacher, students: means over seeds with the least and the greatest."""
    rows = [["", "evaluations", f"FD-pixels, n = {run['n']:,}", "right, captions of the set", "right, unseen pairs", "seconds of training"]]
    teachers = run["rows"]["teacher"]
    real = teachers[0]["real"]
    rows.append(["real pictures", "", short(real["fd"]), f"{real['accuracy']:.3f} (unseen digits)", "", ""])
    rows.append(spread("teacher", teachers))
    rows += [
        spread(f"teacher, {how}", [one[key] for one in teachers]) for how, key in (("guidance 2", "guided"), ("one step", "undistilled"))
    ]
    few = {name: f" (seeds: {len(each)})" * (len(each) < run["seeds"]) for name, each in run["rows"].items()}
    rows += [spread(ROWS.get(name, name) + few[name], each) for name, each in run["rows"].items() if name != "teacher"]
    about = f"{run['device']}, one thread a run, torch {run['versions']['torch']}; means of {run['seeds']} seeds, each with a teacher of its own, two at a time"
    return f"{about}; in brackets the least and the greatest.\n\n{table(rows)}"


def spread(title: str, each: list[dict[str, Any]]) -> list[str]:
    """A row."""
    distances = [one["fd"] for one in each]
    middle = [sum(one[key] for one in each) / len(each) for key in ("fd", "accuracy", "held_out")]
    seconds = f"{sum(one['seconds'] for one in each) / len(each):.0f}" if "seconds" in each[0] else ""
    fd = f"{middle[0]:.2f} ({min(distances):.2f} … {max(distances):.2f})"
    return [title, str(each[0]["nfe"]), fd, f"{middle[1]:.3f}", f"{middle[2]:.3f}", seconds]


def guided_sim(run: dict[str, Any]) -> str:
    """What of guided SIM lets it run away: the distance along the run, by seed, and what was said of it."""
    rows = [["guidance", "FD-pixels along the run, each seed", "accuracy at the end", "variance beside the data's", "alarms"]]
    for name, each in run["rows"].items():
        if name != "teacher":
            curves = "; ".join(" ".join(f"{fd:.2f}" for _, fd in one["curve"]) for one in each)
            variance = [v for one in each for v in one["variance"] if v is not None]
            said = sum(bool(one["alarms"]) for one in each)
            accuracy = f"{min(one['accuracy'] for one in each):.3f}"
            rows.append([name, curves, accuracy, f"{sum(variance) / len(variance):.2f}", f"{said} of {len(each)}"])
    return table(rows)


def few_steps(run: dict[str, Any]) -> str:
    """A method a row, one to four evaluations."""
    evaluations = sorted({one["nfe"] for one in run["means"]})
    rows = [["FD-pixels; training, an image", *(f"{n} evaluation{'s' * (n > 1)}" for n in evaluations)]]
    for method in dict.fromkeys(one["method"] for one in run["means"]):
        cells = {one["nfe"]: one for one in run["means"] if one["method"] == method}
        rows.append(
            [
                NAMES[method],
                *(_few(cells[n], [one["fd"] for one in run["rows"] if (one["method"], one["nfe"]) == (method, n)]) for n in evaluations),
            ]
        )
    teachers = ", ".join(short(one["fd"]) for one in run["teachers"])
    floor = short(run["teachers"][0]["floor"])
    return (
        f"{run['device']}, one thread a run, torch {run['versions']['torch']}; means of {run['seeds']} seeds, in brackets the least and the greatest; "
        f"teachers {teachers} at {run['teachers'][0]['nfe']} evaluations, real images {floor}.\n\n{table(rows)}"
    )


def _few(cell: dict[str, Any], each: list[float]) -> str:
    return f"{short(cell['fd'])} ({short(min(each))} … {short(max(each))}); {cell['seconds']:.0f} s, {cell['ms_per_image']:.2f} ms"


SIDA = {
    "teacher": "teacher",
    "sim": "SIM",
    "sid": "SiD",
    "sida": "SiDA",
    "sid2a": "SiD²A, half of the time SiD",
    "dmd2": "DMD2, a GAN head",
}


def sida(run: dict[str, Any]) -> str:
    """A method a row, at equal seconds."""
    rows = [["", "evaluations", f"FD-{run.get('features', 'pixels')}", "seconds of training", "thousand images"]]
    for name, each in run["rows"].items():
        mean, fds = run["means"][name], [one["fd"] for one in each]
        fd = short(mean["fd"]) + (f" ({short(min(fds))} … {short(max(fds))})" if len(fds) > 1 else "")
        rows.append([SIDA[name], f"{mean['nfe']:.0f}", fd, cell(mean["seconds"], ".0f"), cell(mean["kimg"], ".1f")])
    seeds = f"means of {run['seeds']} seeds; in brackets the least and the greatest" if run["seeds"] > 1 else "one seed"
    return f"{run['device']}, one thread a run, torch {run['versions']['torch']}; {run['recipe']}; {seeds}.\n\n{table(rows)}"


KINDS = {
    "captions": ("all.json", captions), "guided": ("sim.json", guided_sim),
    "demo": ("summary.json", demo), "compare": ("compare.json", compare), "night": ("compare.json", night),
    "time": ("time_to_quality.json", time_to_quality), "scaling": ("scaling.json", scaling), "skipping": ("skipping.json", skipping),
    "ladder": ("ladder.json", ladder), "quality": ("ladder_quality.json", quality),
    "soak": ("faults.json", "before.json", soak), "endurance": ("endurance.json", endurance), "fuzz": ("readers.json", "before.json", fuzz),
    "sida": ("digits.json", sida), "sida_fast32": ("fast32.json", sida), "few_steps": ("few_steps.json", few_steps),
}  # fmt: skip


def cpu_of(run: dict[str, Any]) -> str:
    return f"{run['machine']['device']}, threads: {run['machine']['threads']}, torch {run['machine']['torch']}"


def cell(value: Any, form: str) -> str:
    """A number in this form; a text as it is, nothing for None."""
    return "" if value is None else format(value, form) if form and not isinstance(value, str) else str(value)


def short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
