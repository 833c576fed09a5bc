"""plot.py: what it draws, what it prints, and that bad input costs one line and no figure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402

HEADER = "train_loss,train_loss_aux,epoch_time,val_loss,acc_top1,acc_top5\n"
# The first epochs of the published logs.
JITTOR = f"""{HEADER}\
3.789837599,2.675556898,12.2,3.180020571,0.143,0.401
3.548468828,2.48734498,13.5,3.097186089,0.181,0.496
3.442003965,2.40073967,13.1,2.446536779,0.232,0.585
"""
TORCH = f"""{HEADER}\
3.6473939418792725,2.6227355003356934,5.4,2.5119848251342773,0.222,0.578
3.308242082595825,2.3962020874023438,6.2,2.297287702560425,0.299,0.655
3.0759079456329346,2.248555898666382,6.4,2.1816532611846924,0.342,0.695
"""
# What train.py writes: the six columns, then its own.
OURS = """\
train_loss,train_loss_aux,epoch_time,val_loss,acc_top1,acc_top5,train_loss_main,note
3.5,2.5,1.0,2.5,0.2,0.5,2.25,warm-up
3.0,2.0,1.5,2.0,0.4,0.75,2.125,
"""


def write_logs(folder, jittor=None, torch=None):
    for name, text in [("log.csv", jittor), ("log_torch.csv", torch)]:
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def column(text, name):
    header, *rows = [line.split(",") for line in text.splitlines()]
    return [float(row[header.index(name)]) for row in rows]


def figure_of(folder):
    logs, _ = plot.read_logs(folder)
    return plot.draw(logs)


def curves(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


def run_script(*arguments, script=ROOT / "plot.py", **environment):
    command = [sys.executable, script, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_fails(tmp_path, *arguments, says, **environment):
    """Run on the logs in tmp_path and expect it to fail.

    One line on stderr has all of `says` in it, and no file is touched.
    """
    figure = tmp_path / "training_metrics.png"
    figure.write_bytes(b"the earlier figure")
    before = sorted(tmp_path.rglob("*"))
    result = run_script("--logs", tmp_path, *arguments, **environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("plot.py: error: ") and result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    for words in says:
        assert words in result.stderr
    assert figure.read_bytes() == b"the earlier figure"
    assert sorted(tmp_path.rglob("*")) == before


def test_panels_hold_the_columns(tmp_path):
    write_logs(tmp_path, JITTOR, TORCH)
    aux, main, top1, top5 = figure_of(tmp_path).axes
    texts = {"Jittor": JITTOR, "PyTorch": TORCH}
    assert curves(aux) == {
        f"{name}, training": column(text, "train_loss_aux") for name, text in texts.items()
    }
    assert curves(top1) == {
        f"{name}, validation": column(text, "acc_top1") for name, text in texts.items()
    }
    assert curves(top5) == {
        f"{name}, validation": column(text, "acc_top5") for name, text in texts.items()
    }
    assert len(main.lines) == 4
    for name, text in texts.items():
        assert curves(main)[f"{name}, validation"] == column(text, "val_loss")
    for axes in (aux, main, top1, top5):
        assert all(list(line.get_xdata()) == [1, 2, 3] for line in axes.lines)


def test_a_perturbed_run_is_a_thin_third_line(tmp_path):
    write_logs(tmp_path, JITTOR, TORCH)
    (tmp_path / "log_torch_perturbed.csv").write_text(TORCH)
    figure = figure_of(tmp_path)
    for axes in figure.axes:
        jittor, _, perturbed = axes.lines[:: len(axes.lines) // 3]
        assert (
            perturbed.get_label().startswith("PyTorch, perturbed, ")
            and perturbed.get_linewidth() < jittor.get_linewidth()
        )
    assert "perturbed" not in figure.get_suptitle()
    (tmp_path / "log_torch_perturbed.csv").unlink()  # and without it nothing is amiss
    logs, notes = plot.read_logs(tmp_path)
    assert list(logs) == ["Jittor", "PyTorch"] and not any("perturbed" in note for note in notes)


def test_training_is_solid_and_validation_dashed(tmp_path):
    write_logs(tmp_path, JITTOR, TORCH)
    for axes in figure_of(tmp_path).axes:
        for line in axes.lines:
            assert line.get_linestyle() == ("-" if "training" in line.get_label() else "--")
            assert line.get_marker() == ("o" if "training" in line.get_label() else "s")


def test_main_loss_is_derived_where_the_log_lacks_it(tmp_path):
    write_logs(tmp_path, JITTOR, OURS)
    main = curves(figure_of(tmp_path).axes[1])
    assert main["Jittor, training"] == pytest.approx([2.719614840, 2.553530836, 2.481708097])
    assert main["PyTorch, training"] == [2.25, 2.125]  # as logged; 3.5 - 0.4 * 2.5 would be 2.5
    _, notes = plot.read_logs(tmp_path)
    assert notes == ["no train_loss_main in log.csv, drawn is train_loss - 0.4 * train_loss_aux"]


def luminance(color):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in matplotlib.colors.to_rgb(color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_identical_runs_stay_two_visible_curves(tmp_path):
    write_logs(tmp_path, JITTOR, JITTOR)
    for axes in figure_of(tmp_path).axes:
        half = len(axes.lines) // 2
        for jittor, torch in zip(axes.lines[:half], axes.lines[half:]):
            assert list(jittor.get_ydata()) == list(torch.get_ydata())
            assert jittor.get_zorder() > torch.get_zorder()
            assert jittor.get_linewidth() < torch.get_linewidth() / 2
            assert jittor.get_markersize() < torch.get_markersize() / 2
            assert jittor.get_markerfacecolor() != torch.get_markerfacecolor()
            assert abs(luminance(jittor.get_color()) - luminance(torch.get_color())) >= 0.2


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20, 150])
def test_epoch_ticks_are_integers_from_one(tmp_path, epochs):
    write_logs(tmp_path, HEADER + "3,2,1,2,0.2,0.5\n" * epochs)
    for axes in figure_of(tmp_path).axes:
        ticks = list(axes.get_xticks())
        assert ticks[0] == 1 and ticks[-1] <= epochs and len(ticks) <= 10
        assert all(tick == int(tick) for tick in ticks)
        assert axes.get_xlim()[0] < 1 and axes.get_xlim()[1] > epochs


def test_axes_are_labelled_and_the_legend_is_outside(tmp_path):
    write_logs(tmp_path, JITTOR, TORCH)
    figure = figure_of(tmp_path)
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["cross-entropy (nats)"] * 2 + ["accuracy (fraction)"] * 2
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch"] * 4
    title = figure.get_suptitle()
    assert title == "Final top-1 accuracy: Jittor 0.232 (epoch 3), PyTorch 0.342 (epoch 3)"
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_one_log_alone(tmp_path):
    write_logs(tmp_path, torch=TORCH)
    figure = figure_of(tmp_path)
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1, 1]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["PyTorch, training", "PyTorch, validation"]
    assert plot.read_logs(tmp_path)[1][0] == "no log.csv"


def test_runs_of_unequal_length(tmp_path):
    write_logs(tmp_path, JITTOR, OURS)
    for axes in figure_of(tmp_path).axes:
        assert {len(line.get_xdata()) for line in axes.lines} == {2, 3}
        assert axes.get_xlim()[1] > 3


def test_a_single_epoch_is_visible(tmp_path):
    write_logs(tmp_path, "".join(JITTOR.splitlines(True)[:2]))
    for axes in figure_of(tmp_path).axes:
        for line in axes.lines:
            assert (
                len(line.get_ydata()) == 1
                and line.get_marker() in "os"
                and line.get_markersize() > 2
            )


def test_a_run_without_a_finished_epoch_is_left_out(tmp_path, monkeypatch, capsys):
    write_logs(tmp_path, JITTOR, HEADER)
    run_main(monkeypatch, "--logs", tmp_path)
    assert "Note: no finished epoch in log_torch.csv\n" in capsys.readouterr().out
    assert (tmp_path / "training_metrics.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_run_is_drawn(tmp_path, monkeypatch, capsys):
    jittor, torch = JITTOR + "3.3,2.3,12.6,2.4,0.24,0.6\n", TORCH + "nan,nan,6.1,inf,0.05,0.25\n"
    write_logs(tmp_path, jittor, torch)
    run_main(monkeypatch, "--logs", tmp_path)
    output = capsys.readouterr().out
    assert "main loss nan (epoch 4) in training, inf (epoch 4) in validation" in output


def test_summary(tmp_path, monkeypatch, capsys):
    write_logs(tmp_path, OURS, OURS.replace("0.4,0.75,2.125", "0.1,0.75,2.0"))
    run_main(monkeypatch, "--logs", tmp_path)
    expected = f"""\
Jittor after epoch 2: top-1 0.400 (best 0.400), top-5 0.750 (best 0.750), 2.5 minutes in all
PyTorch after epoch 2: top-1 0.100 (best 0.200), top-5 0.750 (best 0.750), 2.5 minutes in all
Largest gap: main loss 0.125 (epoch 2) in training, 0 (epoch 1) in validation, top-1 0.3 (epoch 2)
Figure: {tmp_path / "training_metrics.png"}
"""
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "name, magic", [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("A.SVG", b"<?xml")]
)
def test_format_follows_the_extension(tmp_path, monkeypatch, name, magic):
    write_logs(tmp_path, JITTOR, TORCH)
    run_main(monkeypatch, "--logs", tmp_path, "--output", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["log.csv", "log_torch.csv", name])


def test_default_folder_is_beside_the_script_and_no_display_is_needed(tmp_path):
    (tmp_path / "logs").mkdir()
    write_logs(tmp_path / "logs", JITTOR, TORCH)
    shutil.copy(ROOT / "plot.py", tmp_path)
    result = run_script(script=tmp_path / "plot.py", MPLBACKEND="TkAgg", DISPLAY="")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "logs" / "training_metrics.png").exists()


def test_a_failed_write_keeps_the_earlier_figure(tmp_path):
    class FullDisk:
        def savefig(self, path, format):
            path.write_bytes(b"half a figure")
            raise OSError(28, "No space left on device")

    output = tmp_path / "a.png"
    output.write_bytes(b"the earlier figure")
    with pytest.raises(plot.PlotError, match="No space left on device; "):
        plot.save(FullDisk(), output)
    assert output.read_bytes() == b"the earlier figure"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    "jittor, says",
    [
        (None, ["nothing to draw", "no log.csv, no log_torch.csv; train"]),
        (HEADER, ["nothing to draw", "no finished epoch in log.csv, no log_torch.csv; train"]),
        ("", ["log.csv is empty"]),
        (
            "step,loss,val_loss\n1,2,3\n",
            [
                "log.csv is not",
                "no column train_loss, train_loss_aux, epoch_time, acc_top1, acc_top5",
            ],
        ),
        (
            JITTOR.replace("2.48734498", "oops"),
            ["log.csv line 3, column train_loss_aux: 'oops' is not a number;"],
        ),
        (
            OURS.replace("2.25,", ","),
            ["log.csv line 2, column train_loss_main: '' is not a number;"],
        ),
        (JITTOR + "3.32,2.3", ["log.csv line 5 has 2 cells, the header 6;"]),
        (JITTOR + "1,2,3,4,5,6,7\n", ["log.csv line 5 has 7 cells, the header 6;"]),
        (bytes(range(256)) * 8, ["log.csv is not a text file;"]),
        (b"\0" * 64, ["log.csv"]),
    ],
)
def test_bad_logs(tmp_path, jittor, says):
    write_logs(tmp_path, jittor)
    assert_fails(tmp_path, says=says)


def test_a_bad_log_is_an_error_beside_a_good_one(tmp_path):
    write_logs(tmp_path, JITTOR, "")
    assert_fails(tmp_path, says=["log_torch.csv is empty"])


def test_a_log_that_cannot_be_read(tmp_path):
    (tmp_path / "log.csv").mkdir()
    assert_fails(tmp_path, says=["cannot read", "log.csv: Is a directory;"])


def test_missing_folder(tmp_path):
    folder = tmp_path / "line\nbreak"
    assert_fails(tmp_path, "--logs", folder, says=["line break is not a folder; give --logs"])


@pytest.mark.parametrize(
    "name, says",
    [
        ("metrics.jpg", "metrics.jpg; end --output in .png, .pdf or .svg"),
        ("metrics", "metrics; end --output in .png, .pdf or .svg"),
        ("nowhere/metrics.png", "cannot write"),
        ("log.csv/metrics.png", "cannot write"),
    ],
)
def test_unusable_output(tmp_path, name, says):
    write_logs(tmp_path, JITTOR, TORCH)
    assert_fails(tmp_path, "--output", tmp_path / name, says=[name, says])


def test_unknown_option(tmp_path):
    assert_fails(tmp_path, "--frobnicate", says=["--frobnicate (--help lists the options)"])


def test_missing_matplotlib(tmp_path):
    write_logs(tmp_path, JITTOR, TORCH)
    code = "raise ModuleNotFoundError(\"No module named 'matplotlib'\")\n"
    (tmp_path / "matplotlib.py").write_text(code)
    assert_fails(
        tmp_path,
        PYTHONPATH=str(tmp_path),
        PYTHONDONTWRITEBYTECODE="1",
        says=["No module named 'matplotlib'; run pip install -r requirements-torch.txt"],
    )


def write_visual(folder, suffix, **changes):
    import numpy as np

    generator = np.random.default_rng(0)
    data = {"images": generator.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)}
    for name in ("stage 1", "stage 2", "stage 3", "stage 4", "overview"):
        data[name] = generator.random((3, 8, 8)).astype(np.float32)
    np.savez(folder / f"cam{suffix}.npz", **data | changes)
    return data


def test_pictures_of_both_frameworks_and_their_difference(tmp_path):
    data = write_visual(tmp_path, "")
    moved = data["stage 3"].copy()
    moved[1, 2, 3] += 0.25 * (moved.max() - moved.min())
    write_visual(tmp_path, "_torch", **{"stage 3": moved})
    result = run_script("--visual", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "cam: largest difference" in result.stdout and "in stage 3" in result.stdout
    difference = float(result.stdout.split("largest difference ")[1].split()[0])
    assert 0.19 < difference < 0.26
    assert (tmp_path / "cam_both.png").stat().st_size > 10000


@pytest.mark.parametrize("kind", ["none", "one", "other images", "other maps", "no arrays"])
def test_pictures_that_are_no_pair(tmp_path, kind):
    if kind != "none":
        data = write_visual(tmp_path, "")
    if kind == "other images":
        write_visual(tmp_path, "_torch", images=data["images"] + 1)
    if kind == "other maps":
        write_visual(tmp_path, "_torch", overview=data["overview"][:2])
    if kind == "no arrays":
        (tmp_path / "cam_torch.npz").write_text("text")
    result = run_script("--visual", tmp_path)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    lacks = "lacks a pair such as cam.npz" in lines[0]
    assert lacks == (kind in ("none", "one")) and (lacks or "do not belong together" in lines[0])
    assert not list(tmp_path.glob("*.png"))
