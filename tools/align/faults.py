def explain(pair, rows, departures):
    return [f"{c}: {n}" for c, n in departures.items()]
