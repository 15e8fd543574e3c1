"""What the numbers of a run must be read with, in sentences: one list for the terminal, the report and the model card.

Too few images: a covariance of d features wants more than d images, else it is singular; and even for white features its eigenvalues
spread by d/n (Marchenko and Pastur), which makes a Fréchet distance too large by about d²/4n, as d/4n of the features' whole variance.
At FEW·d images that is 2.5 %, about what FID's usual 50,000 images of 2,048 features have. The bias differs from net to net
(1911.07023), so distances at another n are no comparison.
"""

from typing import Any

from potstill.engine.common.kinds import is_dict, is_number, is_text

FEW = 10  # images a feature
FAR = 10  # times the floor: the demo's teacher is at three, one with an eighth of its training at sixty
BEHIND = 3  # times the teacher's distance: recipes that work end below two and a half


def caveats(summary: dict[str, Any]) -> list[str]:
    """Of a summary.json; [] where nothing was measured."""
    student, teacher, floor = (part if is_dict(part := summary.get(name)) else {} for name in ("student", "teacher", "floor"))
    fd, of_teacher, least = student.get("fd"), teacher.get("fd"), floor.get("fd")
    if not is_number(fd):
        return []
    found = _few(student)
    if is_number(of_teacher) and is_number(least) and of_teacher > FAR * least > 0:
        found.append(
            f"the teacher is {of_teacher / least:.0f} times as far from the data as real images are: it has learnt too little, or is sampled "
            "in too few steps, and a student learns what its teacher knows; train it longer (teacher.train.kimg), or take a better one"
        )
    if is_number(of_teacher) and fd < of_teacher:
        found.append(
            "the student is ahead of its teacher: methods that look at data can be, else it is chance, a weak teacher or too few images; "
            "compare their pictures"
        )
    elif is_number(of_teacher) and fd > BEHIND * of_teacher > 0:
        found.append(
            f"the student is {fd / of_teacher:.1f} times as far from the data as its teacher: train it longer (train.kimg), and look at the "
            "alarms and the curve of its distance in report.html"
        )
    seed = f" ({summary['seed']})" if is_number(summary.get("seed")) else ""
    return [*found, f"one seed of training{seed}: another one ends elsewhere"]


def _few(student: dict[str, Any]) -> list[str]:
    n, d, of = (student.get(name) for name in ("n", "num_features", "reference_images"))
    if not is_number(n) or not is_number(d):
        return [student["warning"]] if is_text(student.get("warning")) else []
    n = min(n, of) if is_number(of) else n
    if n > FEW * d:
        return []
    how = "the covariance is singular, and the distance far too large" if n <= d else f"under {FEW} for each make the distance too large"
    return [f"{n:,} images are too few for {d:,} features: {how}; compare only with distances at the same n"]
