"""Deploy: load an adapter, merge it into plain weights, export; and take it off again."""

import copy

import timm
import torch

from lora_lightning import inject, load_adapter, merge, read_header, remove, save_adapter, unmerge

torch.manual_seed(0)
base = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=4).eval()
images = torch.randn(2, 3, 32, 32)

# Replace by the file of your training (`LoRACallback.adapter_path_`).
trained = copy.deepcopy(base)
inject(trained, rank=4)
for key, parameter in trained.named_parameters():
    if key.endswith("lora_B"):
        torch.nn.init.normal_(parameter, std=0.05)
save_adapter(trained, "adapter.safetensors")

header = read_header("adapter.safetensors")  # rank, targets, base; without a model
print(header["base"], header["config"]["rank"])

model = copy.deepcopy(base)
load_adapter(model, "adapter.safetensors")  # refused where the base has other weights
with torch.no_grad():
    adapted = model(images)

    # Merged, each layer is of its own class again: the cost and the keys are the base's.
    merge(model)
    torch.testing.assert_close(model(images), adapted)
    assert list(model.state_dict()) == list(base.state_dict())
    torch.save(model.state_dict(), "merged.pt")  # an ordinary checkpoint

    # Whoever loads it needs timm alone.
    plain = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=4).eval()
    plain.load_state_dict(torch.load("merged.pt", weights_only=True))
    assert torch.equal(plain(images), model(images))

    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))

    # Exact both ways: the source model is back, bit for bit.
    unmerge(model)
    remove(model)
    assert torch.equal(model(images), base(images))
print("merged, exported and removed")
