"""`python -m jr_onnx`."""

from jr_onnx.cli import main

if __name__ == "__main__":
    main()
