"""``auto`` on a CPU: ONNX Runtime or OpenVINO, graph by graph, whichever was measured to be quicker on this machine"""
