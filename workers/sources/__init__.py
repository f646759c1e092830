"""Sources of labelled images: what a dataset's address means, which classes and images it has, and each image's bytes.

    address      an address in its parts; whether it lies where the operator allows
    source       what every source is, and the rules that hold for the classes of all
    labels       numbers and strings to classes
    shards       which files of a directory belong to which split
    folder       folder:///path             one image a file, a folder for each class
    parquet      parquet:///path            tables with an image and a label in every row
    webdataset   webdataset:///path         tar files, an image and a label under one key
    torchvision  torchvision:NAME?root=/path  MNIST, CIFAR10 and others in torchvision's directories
    hf           hf:/path, hf:NAME@COMMIT   saved by the Hugging Face library, or of its hub
    remote       KIND+s3://bucket/prefix    the same in an object store, copied here first; +gs for Google's
    opening      an address to its source, whatever the kind

No torch and no decoding of images in any of them: the API process checks a submitted dataset with the same code that
the workers read it with.
"""
