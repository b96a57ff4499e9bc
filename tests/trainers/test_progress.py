"""The figures beside the progress bar."""

from fastalign.trainers.progress import evaluation_line


def test_each_log_is_one_line_where_there_is_no_terminal(kit, capsys):
    kit.trainer(kit.model(), kit.pairs(8), disable_tqdm=False, num_train_epochs=1).train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "step 2/2" in line]
    assert lines
    for word in ("loss", "margin", "accuracy", "tokens/s", "padding 0%", "sharing 1."):
        assert word in lines[0]


def test_evaluations_come_with_their_standard_errors(kit, capsys):
    trainer = kit.trainer(kit.model(), kit.pairs(8), kit.pairs(6, seed=1), disable_tqdm=False, eval_strategy="epoch")
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert "eval at step 2: loss" in capsys.readouterr().err
    line = evaluation_line(
        7, {"eval_a_loss": 0.5, "eval_a_rewards/accuracies": 0.75, "eval_a_rewards/accuracies_se": 0.1}
    )
    assert line == "eval_a at step 7: loss 0.5000, accuracy 0.7500 ± 0.1000"


def test_the_bar_carries_the_figures_on_a_terminal(kit, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    kit.trainer(kit.model(), kit.pairs(8), disable_tqdm=False, num_train_epochs=1).train()
    err = capsys.readouterr().err
    assert "margin=" in err
    assert "tokens/s=" in err
    assert "step 2/2" not in err


def test_accuracy_is_that_of_pairs_or_else_of_tokens():
    assert evaluation_line(3, {"eval_loss": 2.0, "eval_mean_token_accuracy": 0.25, "eval_entropy": 3.0}) == (
        "eval at step 3: loss 2.0000, accuracy 0.2500"
    )
    both = {"eval_loss": 2.0, "eval_mean_token_accuracy": 0.25, "eval_rewards/accuracies": 0.5}
    assert evaluation_line(3, both) == "eval at step 3: loss 2.0000, accuracy 0.5000"


def test_reward_models_show_their_own_names():
    logs = {
        "eval_loss": 0.5,
        "eval_accuracy": 0.75,
        "eval_accuracy_se": 0.25,
        "eval_margin": 1.0,
        "eval_loss_se": 0.125,
    }
    assert evaluation_line(3, logs) == ("eval at step 3: loss 0.5000 ± 0.1250, accuracy 0.7500 ± 0.2500, margin 1.0000")
    assert evaluation_line(3, {"eval_loss": 0.5, "eval_label_correlation": 0.25}).endswith("correlation 0.2500")


def test_a_policy_is_evaluated_by_its_score(kit, capsys):
    trainer = kit.ppo(evaluation=kit.prompts(4, seed=3), disable_tqdm=False, eval_strategy="steps", eval_steps=1)
    trainer.train()
    err = capsys.readouterr().err
    last = [entry for entry in trainer.state.log_history if "eval_objective/scores" in entry][-1]
    score, error, kl = (last[f"eval_objective/{name}"] for name in ("scores", "scores_se", "kl"))
    assert f"eval at step 3: score {score:.4f} ± {error:.4f}, KL {kl:.4f}" in err
    (line,) = [line for line in err.splitlines() if "step 3/3" in line and "loss" in line]
    assert "score " in line
    assert "KL " in line
