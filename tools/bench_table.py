"""Print the READMEs' table of times from logs/reference/bench.csv: python docs/bench_table.py [--zh]."""
import csv
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "logs" / "reference" / "bench.csv"
HEADERS = {
    "en": ("", "Jittor", "PyTorch", "PyTorch with NATTEN as pip builds it", "PyTorch with NATTEN, -O3", "Jittor / PyTorch",
           "Jittor / floor", "memory, Jittor / PyTorch"),
    "zh": ("", "Jittor", "PyTorch", "PyTorch 加 pip 构建的 NATTEN", "PyTorch 加 -O3 的 NATTEN", "Jittor / PyTorch", "Jittor / 下限",
           "内存，Jittor / PyTorch"),
}
CHINESE = (("training step", "训练一步"), ("merged inference", "合并后的推理"), ("inference", "推理"), ("data loading", "数据加载"),
           ("depthwise", "深度卷积"), ("batch norm", "BatchNorm"), ("kernel", "核"), ("batch", "批量"), (", ", "，"))


def cell(milliseconds):
    """Three digits, or the whole number; nothing where nothing was measured."""
    if not milliseconds:
        return ""
    value = float(milliseconds)
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rows(language):
    with open(TABLE, newline="") as f:
        for row in csv.DictReader(f):
            if not row["floor_ms"]:  # the first steps of a process, which the text tells
                continue
            task = row["task"].replace("overlock_", "").replace("xxt", "XXT").replace("xt,", "XT,")
            for english, chinese in CHINESE if language == "zh" else ():
                task = task.replace(english, chinese)
            jittor, torch, floor = (float(row[f"{name}_ms"]) for name in ("jittor", "torch", "floor"))
            memory = " / ".join(f"{float(row[f'{name}_peak_mib']):.0f}" for name in ("jittor", "torch"))
            times = [cell(row[f"{name}_ms"]) for name in ("jittor", "torch", "natten", "natten -O3")]
            yield [task, *times, f"{jittor / torch:.2f}", f"{jittor / floor:.1f}", memory]


if __name__ == "__main__":
    language = "zh" if "--zh" in sys.argv[1:] else "en"
    for cells in (HEADERS[language], ["---"] * len(HEADERS[language]), *rows(language)):
        print(f"| {' | '.join(cells)} |")
