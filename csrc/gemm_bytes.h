// The products of bytes.h, for one instruction set. Included by gemm_isa.inc after gemm_kernels.h.

// Blocks of a row as signed bytes: → scale (NaN if an item is not finite).
static inline float bytes_of(const float* x, std::int64_t count, std::int8_t* out,
                             std::int32_t* sum) {
    float most;
    const float norm = norm_of(x, count, &most);
    const bool finite = norm < __builtin_inff();
    const float up = finite && most > 1e-36f ? 127 / most : 0;
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < count; i += 16) {
        const v16 v = up != 0 ? load16(x + i) * up : v16{};
        std::int16_t rounded[16];
        store_int16(rounded, v);
        for (int j = 0; j < 16; ++j) {
            out[i + j] = static_cast<std::int8_t>(rounded[j]);
            total += rounded[j];
        }
    }
    *sum = total;
    return !finite ? __builtin_nanf("") : up != 0 ? 1 / up : 0;
}

static void quantise_bytes(Matrix x, std::int64_t width, const ByteRows& out) {
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < out.padded; ++r) {
        alignas(64) float buffer[512];
        for (std::int64_t b = 0; b < out.blocks; ++b) {
            const std::int64_t at = b * out.padded + r, from = b * out.block;
            const std::int64_t count = r < out.rows ? least(out.block, width - from) : 0;
            if (count) {
                read_row(x, r, from, count, nullptr, buffer, out.block);
            } else {
                __builtin_memset(buffer, 0, out.block * sizeof(float));
            }
            out.scale[at] = bytes_of(buffer, out.block, out.q + at * out.block, out.sum + at);
        }
    }
}

static bool pack_bytes(const BytePack& pack, Matrix w, bool transposed) {
    bool finite = true;
#pragma omp parallel for schedule(static) reduction(&& : finite)
    for (std::int64_t p = 0; p < pack.panels; ++p) {
        alignas(64) float buffer[512];
        std::int8_t row[512];
        for (std::int64_t b = 0; b < pack.blocks; ++b) {
            std::uint8_t* q = pack.q + (p * pack.blocks + b) * pack.block * kTileColumns;
            for (int lane = 0; lane < kTileColumns; ++lane) {
                const std::int64_t n = p * kTileColumns + lane, from = b * pack.block;
                const std::int64_t count = least(pack.block, pack.depth - from);
                for (std::int64_t i = 0; i < pack.block; ++i) {
                    const bool is = n < pack.rows && i < count;
                    buffer[i] = !is ? 0 : transposed ? item(w, from + i, n) : item(w, n, from + i);
                }
                std::int32_t sum;
                const float scale = bytes_of(buffer, pack.block, row, &sum);
                finite = finite && scale == scale;
                pack.scale[b * pack.panels * kTileColumns + n] = scale;
                for (std::int64_t i = 0; i < pack.block; ++i) {
                    q[(i / 4 * kTileColumns + lane) * 4 + i % 4] =
                        static_cast<std::uint8_t>(row[i] + 128);
                }
            }
        }
    }
    return finite;
}

static void multiply_bytes(const ByteRows& x, const BytePack& pack, float* y, std::int64_t stride,
                           const float* bias, bool add, Update update) {
    if (!x.rows || !pack.rows) return;
    const Split split(x.rows, pack.rows);
    const Padded left(update.left, update.stride, x.rows, update.rank);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Task task(split, t, x.rows);
        alignas(64) std::int32_t tile[kTileRows * kTileColumns];
        for (std::int64_t b = 0; b < pack.blocks; ++b) {
            const float* scale = pack.scale + b * pack.panels * kTileColumns;
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                const std::uint8_t* right =
                    pack.q + (p * pack.blocks + b) * pack.block * kTileColumns;
                for (std::int64_t r = task.row; r < task.end; r += kTileRows) {
                    const std::int64_t at = b * x.padded + r;
                    micro_bytes(x.block / 4, reinterpret_cast<const char*>(x.q + at * x.block),
                                x.block, 4, reinterpret_cast<const char*>(right), 128, tile);
                    for (int i = 0; i < kTileRows; ++i) {
                        const std::int32_t much = 128 * x.sum[at + i];
                        for (int j = 0; j < kTileColumns; ++j) tile[i * kTileColumns + j] -= much;
                    }
                    const Place to = place(y, stride, pack.rows, r, task.end, p);
                    put_int(tile, x.scale + at, scale + p * kTileColumns,
                            bias ? bias + p * kTileColumns : nullptr, add || b > 0, to);
                    if (b + 1 == pack.blocks && update.rank) {
                        add_update(left, r, update.right + p * update.rank * kTileColumns,
                                   kTileColumns, update.rank, to);
                    }
                }
            }
        }
    }
}
