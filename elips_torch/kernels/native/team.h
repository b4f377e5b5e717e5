// Threads that share the work of a call.
//
// Torch's, which are OpenMP's, wait for each other and for the next region by spinning, for milliseconds. On free
// cores they are there at once, and others would have to push them aside. Where other processes use the cores,
// spinning takes the time slices which the work needs: a call is over when the last thread has had its turn. Once
// such a wait is seen, calls are shared for a while among threads that sleep soon, and whoever calls does what no
// other thread has begun. So they are in a forked process, where OpenMP has no threads.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>

// Features of queries whose coding takes longer than waking threads.
constexpr int64_t WORTH_SHARING = 2048;

namespace {

// The numbers below n, dealt out to threads in pieces.
class Pieces {
 public:
    Pieces(int64_t n, int64_t size) : n_(n), size_(std::max<int64_t>(size, 1)) {}

    bool are_left() const { return next_.load(std::memory_order_relaxed) < n_; }

    // Take the next piece, if there is one.
    bool take(int64_t& first, int64_t& last) {
        first = next_.fetch_add(size_, std::memory_order_relaxed);
        last = std::min(n_, first + size_);
        return first < n_;
    }

 private:
    const int64_t n_, size_;
    std::atomic<int64_t> next_{0};
};

class Team {
 public:
    // Call body(0), ..., body(n - 1), each once: the first here, the others here or on other threads. None may
    // wait for another.
    template <class Body>
    static void run(int n, const Body& body) {
        if (n <= 1) {
            body(0);
            return;
        }
        Job job{[](const void* b, int i) { (*static_cast<const Body*>(b))(i); }, &body, n};
        if (team().spins())
            team().share_among_openmp(job);
        else
            team().share(job);
    }

 private:
    struct Job {
        void (*call)(const void*, int);
        const void* body;
        int n;
        int next = 1;                 // the first that nobody has begun
        std::atomic<int> running{0};  // on other threads
        Job* after = nullptr;
    };

    class Lock {
       public:
        explicit Lock(pthread_mutex_t& mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
        ~Lock() { pthread_mutex_unlock(&mutex_); }
        Lock(const Lock&) = delete;

       private:
        pthread_mutex_t& mutex_;
    };

    using Clock = std::chrono::steady_clock;
    // As long as waking a thread takes.
    static constexpr std::chrono::microseconds PATIENCE{50};
    // What is long to wait for a thread of OpenMP's; and for how long there are no more such waits, longer each
    // time.
    static constexpr std::chrono::microseconds LONG_WAIT{200};
    static constexpr std::chrono::milliseconds SHORTEST_PAUSE{25}, LONGEST_PAUSE{400};

    static Team& team() { return *made_; }

    // Made when the code is loaded, so that every fork from then on is noticed.
    static Team* make() {
        pthread_atfork([] { pthread_mutex_lock(&made_->mutex_); }, [] { pthread_mutex_unlock(&made_->mutex_); },
                       [] { (new (made_) Team)->is_forked_ = true; });
        return new Team;
    }

    bool spins() const {
        return !is_forked_ && Clock::now().time_since_epoch().count() >= paused_until_.load(std::memory_order_relaxed);
    }

    void share_among_openmp(Job& job) {
        const auto begin = Clock::now();
        auto done = begin;
        std::atomic<Clock::rep> latest{0};
#pragma omp parallel num_threads(job.n)
        {
            const Clock::rep now = Clock::now().time_since_epoch().count();
            for (Clock::rep before = latest; before < now && !latest.compare_exchange_weak(before, now);) {}
            for (int i = omp_get_thread_num(); i < job.n; i += omp_get_num_threads()) job.call(job.body, i);
            if (omp_get_thread_num() == 0) done = Clock::now();
        }
        judge(begin, Clock::time_point(Clock::duration(latest)), done, Clock::now());
    }

    // Whether a wait was for a thread that came late, not for one that had more to do; times are those when the
    // call began, its last thread came, its first was done, and all were.
    void judge(Clock::time_point begin, Clock::time_point latest, Clock::time_point done, Clock::time_point end) {
        Clock::duration pause = SHORTEST_PAUSE;
        if (latest - begin > LONG_WAIT && end - done > LONG_WAIT && end - done > done - begin) {
            pause = Clock::duration(pause_.load(std::memory_order_relaxed));
            paused_until_.store((end + pause).time_since_epoch().count(), std::memory_order_relaxed);
            pause = std::min<Clock::duration>(2 * pause, LONGEST_PAUSE);
        }
        pause_.store(pause.count(), std::memory_order_relaxed);
    }

    void share(Job& job) {
        {
            const Lock lock(mutex_);
            // Where no more can be made, those that are there do it.
            while (n_threads_ < job.n - 1 && start_thread()) ++n_threads_;
            Job* last = first_;
            while (last && last->after) last = last->after;
            (last ? last->after : first_) = &job;
            is_open_.store(true);
            for (int i = std::min(sleeping_, job.n - 1); i > 0; --i) pthread_cond_signal(&work_);
        }
        int number = 0;
        do job.call(job.body, number);
        while ((number = take(job)) < job.n);
        if (spin([&] { return job.running.load() == 0; })) return;
        const Lock lock(mutex_);
        ++waiting_;
        while (job.running.load()) pthread_cond_wait(&done_, &mutex_);
        --waiting_;
    }

    bool start_thread() {
        pthread_t thread;
        const auto work = [](void* team) -> void* { static_cast<Team*>(team)->work(); };
        return pthread_create(&thread, nullptr, work, this) == 0 && pthread_detach(thread) == 0;
    }

    // Return the next number of a job, n where all are taken.
    int take(Job& job) {
        const Lock lock(mutex_);
        return job.next < job.n ? begin(job) : job.n;
    }

    // With the mutex held.
    int begin(Job& job) {
        const int number = job.next++;
        if (job.next == job.n) {
            Job** link = &first_;
            while (*link != &job) link = &(*link)->after;
            *link = job.after;
            is_open_.store(first_ != nullptr);
        }
        return number;
    }

    [[noreturn]] void work() {
        for (;;) {
            spin([&] { return is_open_.load(std::memory_order_relaxed); });
            Job* job;
            int number;
            {
                const Lock lock(mutex_);
                ++sleeping_;
                while (!first_) pthread_cond_wait(&work_, &mutex_);
                --sleeping_;
                job = first_;
                number = begin(*job);
                job->running.fetch_add(1);
            }
            job->call(job->body, number);
            const Lock lock(mutex_);
            // After this the job may be gone.
            if (job->running.fetch_sub(1) == 1 && waiting_) pthread_cond_broadcast(&done_);
        }
    }

    template <class Ready>
    static bool spin(Ready ready) {
        const auto end = Clock::now() + PATIENCE;
        do {
            for (int i = 0; i < 16; ++i) {
                if (ready()) return true;
                _mm_pause();
            }
        } while (Clock::now() < end);
        return ready();
    }

    // Of pthreads: those of C++ ask for a newer library than the process may have.
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t work_ = PTHREAD_COND_INITIALIZER, done_ = PTHREAD_COND_INITIALIZER;
    Job* first_ = nullptr;  // those of which not all has been begun
    std::atomic<bool> is_open_{false};
    int n_threads_ = 0, sleeping_ = 0, waiting_ = 0;
    bool is_forked_ = false;
    // Since the clock's epoch, and how long the next pause is.
    std::atomic<Clock::rep> paused_until_{0}, pause_{Clock::duration(SHORTEST_PAUSE).count()};
    // Never freed: threads go on while a process ends.
    static Team* const made_;
};

Team* const Team::made_ = Team::make();

}  // namespace
