"""The cards that a preflight can stand in for: what a program can ask of them, and their speed."""

from dataclasses import dataclass

GIB = 2**30
KIB = 2**10


@dataclass(frozen=True)
class Card:
    """One card: its data sheet, and the limits of its compute capability (CUDA C++ guide)."""

    name: str  # as the driver gives it
    compute: int  # compute capability, 90 for 9.0
    memory: float  # bytes that cudaMemGetInfo reports as the total
    multiprocessors: int
    threads_per_sm: int
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, the most a kernel can ask for
    l2: int  # bytes
    clock: int  # kHz
    memory_clock: int  # kHz
    bus_width: int  # bits
    bf16_flops: float  # dense, per second
    fp32_flops: float  # without tensor cores, per second
    bandwidth: float  # of memory, bytes per second
    attention: float  # share of the peak that FlashAttention 2 reaches
    link: float  # to the other cards of the machine, bytes per second and direction

    def environment(self, count: int, memory: float) -> dict[str, str]:
        """The stand-in's settings, for runtime.c: `count` such cards with `memory` bytes each."""
        settings = dict(
            NAME=self.name,
            COUNT=count,
            COMPUTE=self.compute,
            MULTIPROCESSORS=self.multiprocessors,
            THREADS_PER_SM=self.threads_per_sm,
            SHARED_PER_SM=self.shared_per_sm,
            SHARED_PER_BLOCK=self.shared_per_block,
            L2=self.l2,
            CLOCK=self.clock,
            MEMORY_CLOCK=self.memory_clock,
            BUS_WIDTH=self.bus_width,
            MEMORY=int(memory),
        )
        return {f"NULLGPU_{name}": str(value) for name, value in settings.items()}


HOPPER = dict(
    compute=90,
    multiprocessors=132,
    threads_per_sm=2048,
    shared_per_sm=228 * KIB,
    shared_per_block=227 * KIB,
    l2=50 * 2**20,
    clock=1_980_000,
    bf16_flops=989e12,
    fp32_flops=67e12,
    attention=0.35,  # it does not use Hopper's own instructions
    link=450e9,  # NVLink 4
)
CARDS = {
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        memory=79.1 * GIB,
        memory_clock=2_619_000,
        bus_width=5120,
        bandwidth=3.35e12,
        **HOPPER,
    ),
    "h200": Card(
        name="NVIDIA H200",
        memory=139.8 * GIB,
        memory_clock=3_201_000,
        bus_width=6144,
        bandwidth=4.8e12,
        **HOPPER,
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        compute=80,
        memory=79.1 * GIB,
        multiprocessors=108,
        threads_per_sm=2048,
        shared_per_sm=164 * KIB,
        shared_per_block=163 * KIB,
        l2=40 * 2**20,
        clock=1_410_000,
        memory_clock=1_593_000,
        bus_width=5120,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        attention=0.6,
        bandwidth=2.04e12,
        link=300e9,  # NVLink 3
    ),
    "4090": Card(
        name="NVIDIA GeForce RTX 4090",
        compute=89,
        memory=23.5 * GIB,
        multiprocessors=128,
        threads_per_sm=1536,
        shared_per_sm=100 * KIB,
        shared_per_block=99 * KIB,
        l2=72 * 2**20,
        clock=2_520_000,
        memory_clock=10_501_000,
        bus_width=384,
        bf16_flops=165e12,
        fp32_flops=82.6e12,
        attention=0.6,
        bandwidth=1.008e12,
        link=25e9,  # PCIe 4 x16
    ),
    "3090": Card(
        name="NVIDIA GeForce RTX 3090",
        compute=86,
        memory=23.6 * GIB,
        multiprocessors=82,
        threads_per_sm=1536,
        shared_per_sm=100 * KIB,
        shared_per_block=99 * KIB,
        l2=6 * 2**20,
        clock=1_695_000,
        memory_clock=9_751_000,
        bus_width=384,
        bf16_flops=71e12,
        fp32_flops=35.6e12,
        attention=0.6,
        bandwidth=0.936e12,
        link=25e9,  # PCIe 4 x16
    ),
    "b200": Card(
        name="NVIDIA B200",
        compute=100,
        memory=178.3 * GIB,
        multiprocessors=148,
        threads_per_sm=2048,
        shared_per_sm=228 * KIB,
        shared_per_block=227 * KIB,
        l2=126 * 2**20,
        clock=1_965_000,
        memory_clock=3_996_000,
        bus_width=8192,
        bf16_flops=2250e12,
        fp32_flops=75e12,
        attention=0.2,  # it does not use Blackwell's own instructions
        bandwidth=8.0e12,
        link=900e9,  # NVLink 5
    ),
    "5090": Card(
        name="NVIDIA GeForce RTX 5090",
        compute=120,
        memory=31.4 * GIB,
        multiprocessors=170,
        threads_per_sm=1536,
        shared_per_sm=100 * KIB,
        shared_per_block=99 * KIB,
        l2=96 * 2**20,
        clock=2_407_000,
        memory_clock=14_001_000,
        bus_width=512,
        bf16_flops=209e12,
        fp32_flops=104.8e12,
        attention=0.6,
        bandwidth=1.79e12,
        link=50e9,  # PCIe 5 x16
    ),
    "l40s": Card(
        name="NVIDIA L40S",
        compute=89,
        memory=44.4 * GIB,
        multiprocessors=142,
        threads_per_sm=1536,
        shared_per_sm=100 * KIB,
        shared_per_block=99 * KIB,
        l2=96 * 2**20,
        clock=2_520_000,
        memory_clock=9_001_000,
        bus_width=384,
        bf16_flops=362e12,
        fp32_flops=91.6e12,
        attention=0.5,
        bandwidth=0.864e12,
        link=25e9,  # PCIe 4 x16
    ),
    "t4": Card(
        name="Tesla T4",
        compute=75,
        memory=14.6 * GIB,
        multiprocessors=40,
        threads_per_sm=1024,
        shared_per_sm=64 * KIB,
        shared_per_block=64 * KIB,
        l2=4 * 2**20,
        clock=1_590_000,
        memory_clock=5_001_000,
        bus_width=256,
        bf16_flops=65e12,  # fp16: it has no bf16
        fp32_flops=8.1e12,
        attention=0.4,
        bandwidth=0.32e12,
        link=12e9,  # PCIe 3 x16
    ),
}
