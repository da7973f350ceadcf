// What every thread does, for all arithmetics of attention. Included by attention.cpp and
// attention_amx.cpp, which have forward_task, backward_head and their memory.

// The heads of a group in turn, or one of them: in both cases each head's sum over the queries is
// whole before it is added to the others', so that the bits are the same.
template <class T, bool kCap>
void backward_task(const Attention& a, const AttentionTask& task, const BackwardSpace& x) {
    if (a.slots == a.heads) {
        return backward_head<T, kCap>(a, task, task.head, task.head, false, x);
    }
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t h = 0; h < group; ++h) {
        backward_head<T, kCap>(a, task, task.head * group + h, task.head, h > 0, x);
    }
}

static int64_t scratch_floats(const Attention& a, bool back) {
    return up_to(back ? backward_floats(a) : forward_floats(a), 16);
}

template <class T, bool kCap>
void run(const Attention& a, bool back) {
    const int64_t floats = scratch_floats(a, back);
#pragma omp parallel num_threads(a.threads)
    {
        float* scratch = a.scratch + floats * omp_get_thread_num();
        const ForwardSpace there = forward_space(a, scratch);
        const BackwardSpace returning = backward_space(a, scratch);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.task_count; ++i) {
            if (back) {
                backward_task<T, kCap>(a, a.tasks[i], returning);
            } else {
                forward_task<T, kCap>(a, a.tasks[i], there);
            }
        }
        if (back) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < a.task_count; ++i) finish<T>(a, a.tasks[i]);
        }
    }
}

static void start(const Attention& a, bool back) {
    with_type(a.type, [&](auto type) {
        using T = decltype(type);
        a.softcap > 0 ? run<T, true>(a, back) : run<T, false>(a, back);
    });
}
