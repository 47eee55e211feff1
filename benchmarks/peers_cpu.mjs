// One measurement of llama.cpp through node-llama-cpp: node peers_cpu.mjs MODEL THREADS MAX_SEQ_LEN < tasks.json
// A task: {"streams", "prompt", "tokens"}. Each answer is one line of JSON, as benchmarks/peers_cpu.py's own.
import {readFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [path, threads, length] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: threads});
const before = process.memoryUsage().rss;
const model = await llama.loadModel({modelPath: path, gpuLayers: 0});

async function measure({streams, prompt, tokens}) {
    const context = await model.createContext({sequences: streams, contextSize: length, batchSize: 512, threads});
    const began = performance.now(), firsts = [];
    let count = 0;
    const runs = Array.from({length: streams}, (_, number) => context.getSequence()).map(async (sequence, number) => {
        const ids = Array.from({length: prompt}, (_, place) => 1000 + (place * 7 + number) % 5000);
        let own = 0;
        for await (const _ of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
            if (own++ === 0) firsts.push(performance.now() - began);
            if (own === tokens) break;
        }
        count += own;
    });
    await Promise.all(runs);
    const first = Math.max(...firsts), seconds = (performance.now() - began - first) / 1e3;
    const rate = seconds > 0 && count > streams ? (count - streams) / seconds : 0;
    await context.dispose();
    return {first_ms: first, tokens_s: rate, rss_mb: process.memoryUsage().rss / 1e6, base_mb: before / 1e6};
}

const tasks = JSON.parse(readFileSync(0, "utf8"));
await measure({streams: 1, prompt: 16, tokens: 4});
for (const task of tasks) console.log(JSON.stringify(await measure(task)));
process.exit(0);
