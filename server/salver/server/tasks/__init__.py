"""From a head's numbers to answers: labels, spans, ranks. numpy only."""
