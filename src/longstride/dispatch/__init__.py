"""From a call to a backend: check the arguments, choose a backend, run it inside an operator; and say why."""
