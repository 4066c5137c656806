"""Each check of notebook 10 accepts its solution and names the cause of plausible mistakes."""

import torch

from longseq_tutorial.classroom.checks.long_range_arena import (
    check_argument_distances,
    check_evaluate,
    check_median,
    check_pad,
    check_raster_steps,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved


def stub(*arguments):
    raise NotImplementedError("your turn: write it")


# ------------------------------------------------------------------ 1: median


def median(values):
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def test_median_accepts_the_solution_and_another_way_to_write_it():
    assert_accepts(check_median, median)
    assert_accepts(check_median, lambda v: int(torch.tensor(v, dtype=torch.float64).quantile(0.5).floor()))
    assert_unsolved(check_median, stub)


def test_median_rejects():
    wrong = {
        "torch.median does": lambda v: int(torch.tensor(v).median()),
        "upper": lambda v: sorted(v)[len(v) // 2],
        "left unrounded": lambda v: (sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2]) / 2,
        "rounded up": lambda v: -(-(sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2]) // 2),
        "rounded to the nearest": lambda v: round((sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2]) / 2),
        "not sorted": lambda v: (v[(len(v) - 1) // 2] + v[len(v) // 2]) // 2,
        "mean, not the median": lambda v: int(sum(v) / len(v)),
        "return": lambda v: None,
    }
    for words, function in wrong.items():
        assert_rejects(check_median, function, words)


# ------------------------------------------------------------------ 2: evaluate

RULES = {"[MIN": min, "[MAX": max, "[SM": lambda v: sum(v) % 10, "[MED": median}


def evaluate(expression, rules=RULES, number=int):
    stack = [(None, [])]
    for word in expression.split():
        if word.startswith("["):
            stack.append((word, []))
        elif word == "]":
            operator, values = stack.pop()
            stack[-1][1].append(rules[operator](values))
        else:
            stack[-1][1].append(number(word))
    return stack[0][1][0]


def with_rule(operator, rule):
    return lambda expression: evaluate(expression, {**RULES, operator: rule})


def test_evaluate_accepts_the_solution_and_a_recursive_one():
    def recursive(expression):
        words = iter(expression.split())

        def item(word):
            if not word.startswith("["):
                return int(word)
            values = []
            for following in words:
                if following == "]":
                    return RULES[word](values)
                values.append(item(following))

        return item(next(words))

    assert_accepts(check_evaluate, evaluate)
    assert_accepts(check_evaluate, recursive)
    assert_unsolved(check_evaluate, stub)


def test_evaluate_rejects():
    def flat(expression):
        words = expression.split()
        digits = [int(word) for word in words if word.isdigit()]
        return RULES[words[0]](digits) if len(words) > 1 else digits[0]

    def direct(expression):
        level, digits = 0, []
        words = expression.split()
        for word in words:
            level += word.startswith("[") - (word == "]")
            if word.isdigit() and level <= 1:
                digits.append(int(word))
        return RULES[words[0]](digits) if len(words) > 1 else digits[0]

    def early(expression):
        stack = []
        for word in expression.split():
            if word == "]":
                operator, values = stack.pop()
                return RULES[operator](values)
            if word.startswith("["):
                stack.append((word, []))
            elif stack:
                stack[-1][1].append(int(word))
            else:
                return int(word)

    wrong = {
        "modulo 10": with_rule("[SM", sum),
        "takes the lower": with_rule("[MED", lambda v: sorted(v)[(len(v) - 1) // 2]),
        "takes the upper": with_rule("[MED", lambda v: sorted(v)[len(v) // 2]),
        "rounds up": with_rule("[MED", lambda v: -(-(sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2]) // 2)),
        "exchanged": lambda e: evaluate(e, {**RULES, "[MIN": max, "[MAX": min}),
        "all digits go to the outermost": flat,
        "directly under the outermost": direct,
        "ends the whole expression": early,
        "convert them with int()": lambda e: str(evaluate(e)),
    }
    for words, function in wrong.items():
        assert_rejects(check_evaluate, function, words)


# ------------------------------------------------------------------ 3: distances


def argument_distances(expression):
    opened, distances = [], []
    for place, token in enumerate(expression.split()):
        if token == "]":
            opened.pop()
            continue
        if opened:
            distances.append(place - opened[-1])
        if token.startswith("["):
            opened.append(place)
    return torch.tensor(distances)


def test_argument_distances_accepts_the_solution():
    assert_accepts(check_argument_distances, argument_distances)
    assert_unsolved(check_argument_distances, stub)


def test_argument_distances_rejects():
    def from_the_root(expression):
        return torch.tensor([p for p, token in enumerate(expression.split()) if p and token != "]"])

    def pushed_too_early(expression):
        opened, distances = [], []
        for place, token in enumerate(expression.split()):
            if token == "]":
                opened.pop()
                continue
            if token.startswith("["):
                opened.append(place)
            distances.append(place - opened[-1])
        return torch.tensor(distances)

    def never_popped(expression):
        opened, distances = [], []
        for place, token in enumerate(expression.split()):
            if token != "]" and opened:
                distances.append(place - opened[-1])
            if token.startswith("["):
                opened.append(place)
        return torch.tensor(distances)

    def with_closes(expression):
        opened, distances = [], []
        for place, token in enumerate(expression.split()):
            if opened:
                distances.append(place - opened[-1])
            if token == "]":
                opened.pop()
            if token.startswith("["):
                opened.append(place)
        return torch.tensor(distances)

    def ordinals(expression):
        counts, out = [], []
        for token in expression.split():
            if token == "]":
                counts.pop()
                continue
            if counts:
                counts[-1] += 1
                out.append(counts[-1])
            if token.startswith("["):
                counts.append(0)
        return torch.tensor(out)

    def digits_only(expression):
        opened, distances = [], []
        for place, token in enumerate(expression.split()):
            if token == "]":
                opened.pop()
            elif token.startswith("["):
                opened.append(place)
            else:
                distances.append(place - opened[-1])
        return torch.tensor(distances)

    def closes_left_out(expression):
        opened, distances, place = [], [], 0
        for token in expression.split():
            if token == "]":
                opened.pop()
                continue
            if opened:
                distances.append(place - opened[-1])
            if token.startswith("["):
                opened.append(place)
            place += 1
        return torch.tensor(distances)

    wrong = {
        "from the outermost operator": from_the_root,
        "so that it is 0": pushed_too_early,
        "off the stack": never_popped,
        "counted as arguments": with_closes,
        "counts arguments, not tokens": ordinals,
        "operator token is missing": digits_only,
        "left out of the count": closes_left_out,
        "dtype": lambda e: argument_distances(e).float(),
    }
    for words, function in wrong.items():
        assert_rejects(check_argument_distances, function, words)


# ------------------------------------------------------------------ 4: pad


def pad(sequences, value=0):
    longest = max(len(s) for s in sequences)
    x = sequences[0].new_full((len(sequences), longest), value)
    for row, sequence in zip(x, sequences, strict=True):
        row[: len(sequence)] = sequence
    return x, torch.arange(longest) < torch.tensor([len(s) for s in sequences])[:, None]


def test_pad_accepts_the_solution_and_torchs_own():
    def torchs(sequences):
        x = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        return x, pad(sequences)[1]

    assert_accepts(check_pad, pad)
    assert_accepts(check_pad, torchs)
    assert_unsolved(check_pad, stub)


def test_pad_rejects():
    def left(sequences):
        longest = max(len(s) for s in sequences)
        x = torch.stack([torch.cat([s.new_zeros(longest - len(s)), s]) for s in sequences])
        lengths = torch.tensor([len(s) for s in sequences])[:, None]
        return x, torch.arange(longest) >= longest - lengths

    def cut(sequences):
        shortest = min(len(s) for s in sequences)
        x = torch.stack([s[:shortest] for s in sequences])
        return x, torch.ones_like(x, dtype=torch.bool)

    wrong = {
        "wrong way round": lambda s: (pad(s)[0], ~pad(s)[1]),
        "x != 0": lambda s: (pad(s)[0], pad(s)[0] != 0),
        "on the left": left,
        "to the shortest": cut,
        "one place too long": lambda s: (
            pad(s)[0],
            torch.arange(pad(s)[0].shape[1]) <= torch.tensor([len(x) for x in s])[:, None],
        ),
        "not bool": lambda s: (pad(s)[0], pad(s)[1].to(torch.int64)),
        "made of floats": lambda s: (pad(s)[0], pad(s)[1].float()),
        "padding is -1": lambda s: pad(s, -1),
        "wanted 2 results": lambda s: pad(s)[0],
        "wrong order": lambda s: (pad(s)[1], pad(s)[0]),
    }
    for words, function in wrong.items():
        assert_rejects(check_pad, function, words)


# ------------------------------------------------------------------ 5: raster_steps


def raster_steps(path, columns):
    place = path[:, 0] * columns + path[:, 1]
    return (place[1:] - place[:-1]).abs()


def test_raster_steps_accepts_the_solution_and_another_way_to_write_it():
    assert_accepts(check_raster_steps, raster_steps)
    assert_accepts(
        check_raster_steps,
        lambda path, columns: (path.diff(dim=0) * torch.tensor([columns, 1])).sum(1).abs(),
    )
    assert_unsolved(check_raster_steps, stub)


def test_raster_steps_rejects():
    wrong = {
        "exchanged": lambda path, columns: (path[:, 1] * columns + path[:, 0]).diff().abs(),
        "Pythagoras": lambda path, columns: (path.diff(dim=0).double() ** 2).sum(1).sqrt(),
        "rows and columns alike": lambda path, columns: path.diff(dim=0).abs().sum(1),
        "lost their sign": lambda path, columns: path[:, 0].diff().abs() * columns + path[:, 1].diff().abs(),
        "sign is still there": lambda path, columns: (path[:, 0] * columns + path[:, 1]).diff(),
        "first point": lambda path, columns: ((path[1:, 0] - path[0, 0]) * columns + path[1:, 1] - path[0, 1]).abs(),
        "columns are left out": lambda path, columns: columns * path[:, 0].diff().abs(),
        "places in the sequence": lambda path, columns: path[:, 0] * columns + path[:, 1],
        "return": lambda path, columns: None,
    }
    for words, function in wrong.items():
        assert_rejects(check_raster_steps, function, words)
